"""Which fields of a schema does code read? Found in its syntax, by following what a name is bound to.

A name is a config node where a parameter or an attribute is annotated as one, or where it is bound to a field of a
known node. So `config.training.steps` and `training = config.training; training.steps` both read
`TrainingConfig.steps`, and `state.steps` does not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

Classes = dict[str, dict[str, str]]
"""The annotation of each attribute of each class."""


def undocumented_fields(schema: str) -> list[str]:
    """Return the fields that no docstring follows."""
    return [
        f"{node.name}.{ast.unparse(line.target)}"
        for node in _classes(ast.parse(schema))
        for line, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True)
        if isinstance(line, ast.AnnAssign) and not _is_docstring(following)
    ]


def unread_fields(schema: str, sources: Iterable[str]) -> list[str]:
    """Return the fields that none of the sources reads."""
    fields = {node.name: _annotated(node) for node in _classes(ast.parse(schema))}
    trees = [ast.parse(source) for source in sources]
    classes = {node.name: _annotated(node) | _taken_over(node) for tree in trees for node in _classes(tree)} | fields
    read: set[str] = set()
    for tree in trees:
        _Reader(classes, read).visit(tree)
    return [f"{node}.{name}" for node, names in fields.items() for name in names if f"{node}.{name}" not in read]


class _Reader(ast.NodeVisitor):
    """Walks a module, knows of which class its names are, and notes each attribute that is read."""

    def __init__(self, classes: Classes, read: set[str]) -> None:
        self.classes, self.read = classes, read
        self.names: dict[str, str | None] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.names = self.names, self.names | {"self": node.name}
        self.generic_visit(node)
        self.names = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.names = self.names, dict(self.names)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            if argument.annotation is not None:
                self.names[argument.arg] = self._class_in(ast.unparse(argument.annotation))
        self.generic_visit(node)
        self.names = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target, value in _pairs(node):
            if isinstance(target, ast.Name):
                self.names[target.id] = self._class_of(value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            self.read.add(f"{self._class_of(node.value)}.{node.attr}")

    def _class_of(self, value: ast.expr) -> str | None:
        """Return the class that an expression is one of, as far as that can be seen."""
        if isinstance(value, ast.Name):
            return self.names.get(value.id)
        if isinstance(value, ast.Attribute):
            return self._class_in(self.classes.get(self._class_of(value.value) or "", {}).get(value.attr, ""))
        if isinstance(value, ast.Subscript):  # one of a list, whose annotation names its class
            return self._class_of(value.value)
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "replace" and value.args:
            return self._class_of(value.args[0])
        return None

    def _class_in(self, annotation: str) -> str | None:
        return next((word for word in re.findall(r"\w+", annotation) if word in self.classes), None)


def _classes(tree: ast.Module) -> Iterator[ast.ClassDef]:
    return (node for node in tree.body if isinstance(node, ast.ClassDef))


def _annotated(node: ast.ClassDef) -> dict[str, str]:
    return {
        ast.unparse(line.target): ast.unparse(line.annotation) for line in node.body if isinstance(line, ast.AnnAssign)
    }


def _taken_over(node: ast.ClassDef) -> dict[str, str]:
    """Return the attributes that __init__ sets to its own arguments, or annotates."""
    found = {}
    for init in node.body:
        if isinstance(init, ast.FunctionDef) and init.name == "__init__":
            given = {one.arg: ast.unparse(one.annotation) for one in init.args.args if one.annotation is not None}
            for line in init.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Attribute):
                    found[line.target.attr] = ast.unparse(line.annotation)
                for target, value in _pairs(line) if isinstance(line, ast.Assign) else ():
                    if isinstance(target, ast.Attribute) and isinstance(value, ast.Name) and value.id in given:
                        found[target.attr] = given[value.id]
    return found


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)  # *rest takes several
        else:
            yield target, node.value


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
