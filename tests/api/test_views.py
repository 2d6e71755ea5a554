"""What one looks at: `titan.diff`, `titan.show`, `titan.metrics`."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest
from omegaconf import OmegaConf

import titan
from titan.api.tree import describe_keys
from titan.config.keys import flatten, schema_keys
from titan.config.load import save_config
from titan.errors import CommandError, ConfigError, TitanError

NASTY = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Reads HTML as a browser does: its text, and its elements with what is open when each comes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.elements, self.open = "", [], []  # type: ignore[var-annotated]
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


# diff


def test_a_difference_is_what_a_comparison_of_the_yaml_finds() -> None:
    """Every key in which the plain containers differ, with both values, and no other."""
    a = titan.compose("model=llama3_8b", "run.dir=one")
    b = titan.compose(
        "model=llama3_8b", "parallelism=fsdp_tp", "optimizer.lr=1e-5", "data=text", "data.path=x", "run.dir=two"
    )

    def leaves(config: object) -> dict[str, object]:
        container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
        return {key: value for key, value in pandas.json_normalize(container).iloc[0].items() if value == value}

    mine, others = leaves(a), leaves(b)
    wanted = {key for key in {**mine, **others} if mine.get(key) != others.get(key)}
    found = titan.diff(a, b)
    assert set(found) == wanted
    assert {key: (each.before, each.after) for key, each in found.items()} == {
        key: (mine.get(key), others.get(key)) for key in wanted
    }


def test_a_difference_says_what_makes_another_run() -> None:
    """By the same rule by which a resume is refused."""
    found = titan.diff(titan.compose(), titan.compose("model.n_layers=3", "training.steps=5"))
    assert {key: each.makes_another_run for key, each in found.items()} == {
        "model.n_layers": True,
        "training.steps": False,
    }
    assert found.makes_another_run
    assert not titan.diff(titan.compose(), titan.compose("training.steps=5")).makes_another_run


def test_the_time_of_day_in_a_directory_is_no_difference() -> None:
    """Nobody chose it; a name that somebody chose is one."""
    a, b = titan.compose(), titan.compose()
    b.run.dir = "runs/llama3_debug/2001-01-01_00-00-00"
    assert not titan.diff(a, b)
    b.run.dir = "runs/mine"
    assert list(titan.diff(a, b)) == ["run.dir"]


def test_run_directories_and_files_are_compared_too(tmp_path: Path, trained: Path) -> None:
    """A directory, its config.yaml, a string or a path; what a run had filled in is filled in on the other side."""
    again = titan.compose(
        *("model.dim=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.ffn_dim=64"),
        *("model.vocab_size=320", "training.seq_len=32", "training.local_batch_size=2", "training.steps=9"),
        *("data=text", f"data.path={tmp_path}/none.txt", "metrics.log_every=1", f"run.dir={trained}"),
    )
    (tmp_path / "none.txt").write_text("words")
    for left in (trained, str(trained), trained / "config.yaml"):
        assert {"training.steps", "data.path"} <= set(titan.diff(left, again))
        # -1 and null were filled in
        assert not {"parallelism.dp_shard", "cluster.nodes", "training.global_batch_size"} & set(
            titan.diff(left, again)
        )
    assert not titan.diff(trained, trained / "config.yaml")


def test_what_is_no_config_is_said(tmp_path: Path) -> None:
    """A path that leads nowhere, a file of something else, a value that is no path."""
    with pytest.raises(CommandError, match="does not exist"):
        titan.diff(titan.compose(), tmp_path / "none")
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match="is not a key"):
        titan.show(tmp_path)
    with pytest.raises(TypeError, match="not int: 3"):
        titan.diff(titan.compose(), 3)  # type: ignore[arg-type]


def test_a_difference_is_readable_as_text_and_as_html() -> None:
    """The text has a line a key; the page escapes what values hold."""
    a, b = titan.compose(), titan.compose("training.steps=5")
    b.cluster.partition = NASTY
    found = titan.diff(a, b)
    lines = repr(found).splitlines()
    assert lines[0] == "2 keys differ; a run of the one can go on with the other"
    assert re.fullmatch(r"  training\.steps\s+300\s+5", lines[2])
    page = Page(found._repr_html_())
    assert NASTY in page.words
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert repr(titan.diff(a, a)) == "no key differs"
    assert "no key differs" in Page(titan.diff(a, a)._repr_html_()).words


# show


def test_a_tree_has_every_key_and_marks_what_is_not_the_default() -> None:
    """The keys are those of the flattened config; the marks are those of a comparison with `compose()`."""
    config = titan.compose("training.steps=5", "parallelism.tp=2")
    tree = titan.show(config)
    assert {leaf.key: leaf.value for leaf in tree.leaves} == flatten(config)
    assert [(leaf.key, leaf.value, leaf.default) for leaf in tree.changed] == [
        ("training.steps", 5, 300),
        ("parallelism.tp", 2, 1),
    ]
    text = repr(tree)
    assert text.splitlines()[0] == f"config, 2 of {len(flatten(config))} keys differ from the defaults (*)"
    assert "├── steps: 5  * (default 300)" in text
    assert text.count("*") == 3
    assert "seed: 0\n" in text


def test_the_defaults_themselves_have_no_mark() -> None:
    """And a run.dir that nobody chose is none of them."""
    assert not titan.show(titan.compose()).changed


def test_a_tree_folds_in_a_notebook_and_escapes(tmp_path: Path) -> None:
    """Groups are <details>, open where they have a mark; a value is text whatever it holds; a key has its meaning."""
    config = titan.compose("training.steps=5")
    config.cluster.setup = [NASTY, '" onclick="x']
    page = Page(titan.show(config)._repr_html_())
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert not [attributes for _, attributes in page.elements if "onclick" in attributes]
    assert NASTY in page.words
    folds = [attributes for tag, attributes in page.elements if tag == "details"]
    groups = {key.rpartition(".")[0] for key in flatten(config)}
    assert len(folds) == 1 + len(groups)
    assert sum("open" in attributes for attributes in folds) == 3  # the whole, training, cluster
    assert ("div", {"class": "leaf", "title": describe_keys()["training.steps"]}) in page.elements


def test_a_run_is_compared_with_what_the_defaults_become_here(trained: Path) -> None:
    """What was filled in for the machine is not the user's doing."""
    keys = [leaf.key for leaf in titan.show(trained).changed]
    assert "training.steps" in keys
    assert "cluster.nodes" not in keys


def test_every_key_of_the_schema_has_its_meaning() -> None:
    """The tooltips come from the schema's own docstrings."""
    missing = [name for name, key in schema_keys().items() if not describe_keys()[name] and not key.is_node]
    assert not missing


def test_a_mixture_is_spelled_as_it_is_typed() -> None:
    """Components are dataclasses in a table."""
    config = titan.compose("data=mixture", "+data.components.code={kind:text,path:x,weight:2}")
    assert "components: {code: {kind: text, path: x, weight: 2.0}}" in repr(titan.show(config))


# metrics


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """A run directory with 40 rows, two validations, and a line that is still being written."""
    rows = [
        {"step": step, "loss": 4 - step / 20, "mfu": None, "tokens_per_second": 1e5 * step} for step in range(1, 41)
    ]
    rows.insert(20, {"step": 20, "validation_loss": 3.3, "validation_perplexity": 27.1})
    rows.append({"step": 40, "validation_loss": None, "validation_perplexity": None})
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 41, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def test_rows_and_validations_are_tables_apart(logged: Path) -> None:
    """What was written is what is there; half a line is not."""
    table = titan.metrics(logged)
    assert len(table) == 40
    assert table.columns == ["step", "loss", "mfu", "tokens_per_second"]
    assert table["loss"] == [4 - step / 20 for step in range(1, 41)]
    assert table[-1]["step"] == 40
    assert table[:3]["step"] == [1, 2, 3]
    assert [row["step"] for row in table] == list(range(1, 41))
    assert table.validation["validation_loss"] == [3.3, None]
    with pytest.raises(KeyError, match="there is no column los; there are: step, loss"):
        table["los"]


def test_a_table_is_readable(logged: Path) -> None:
    """The text shows both ends, without columns that have nothing in them; the page has the same numbers."""
    table = titan.metrics(logged)
    lines = repr(table).splitlines()
    assert lines[0].split() == ["step", "loss", "tokens_per_second"]
    assert lines[1].split() == ["1", "3.9500", "100,000"]
    assert lines[7] == "... 28 rows ..."
    assert lines[13].split() == ["40", "2.0000", "4,000,000"]
    assert lines[14:] == ["40 rows; also mfu", "2 validations in .validation"]
    page = Page(table._repr_html_())
    assert [tag for tag, _ in page.elements].count("tr") == 1 + 13
    assert "4,000,000" in page.words


def test_a_table_becomes_pandas(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the step as index; without pandas, it says what to install."""
    frame = titan.metrics(logged).to_pandas()
    assert frame.loc[20, "loss"] == 3.0
    assert list(frame.columns) == ["loss", "mfu", "tokens_per_second"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(TitanError, match="pip install pandas"):
        titan.metrics(logged).to_pandas()


def test_names_in_a_table_are_escaped(tmp_path: Path) -> None:
    """A file may hold anything."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, NASTY: NASTY}) + "\n")
    page = Page(titan.metrics(tmp_path)._repr_html_())
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert NASTY in page.words


def test_a_run_that_has_logged_nothing_has_no_rows(tmp_path: Path) -> None:
    """That is no mistake; a directory that is not there is one."""
    save_config(titan.compose(), tmp_path / "config.yaml")
    assert len(titan.metrics(tmp_path)) == 0
    assert repr(titan.metrics(tmp_path)) == "no rows yet"
    assert "no rows yet" in titan.metrics(tmp_path / "config.yaml")._repr_html_()
    with pytest.raises(CommandError, match="there is no such directory"):
        titan.metrics(tmp_path / "none")


def test_the_table_of_a_real_run_is_its_file(trained: Path) -> None:
    """Held against the file, read without titan."""
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert list(titan.metrics(trained)) == rows
