"""The command that fetches from the Hugging Face hub: `python -m titan.download tokenizer | checkpoint REPO`.

tokenizer    a repository's tokenizer: its tokenizer.json and the files beside it, its tokenizer.model
checkpoint   its weights as safetensors, its config and its tokenizer; nothing of it twice

HF_TOKEN, or the login that `hf auth login` has kept, says who asks; no token is ever shown. A connection that breaks
is taken up again where it broke, and a command that is typed again fetches only the files that are not whole. At the
end stand the words to train with.

Exit codes: 0 done; 2 it could not be fetched, and why.
"""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants, errors

from titan.command import exit_code
from titan.config.schema import TokenizerKind
from titan.config.tokenizer_files import guess_kind
from titan.errors import CommandError, TitanError

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    parsed = build_parser().parse_args(arguments)
    original = getattr(parsed, "original", False)

    def run() -> None:
        for line in download(parsed.repo, parsed.what, parsed.revision, parsed.to, original):
            print(line, flush=True)

    sys.exit(exit_code(run, "interrupted; the same command goes on, and files that are whole stay"))


def build_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m titan.download", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="what")
    for name, words in (("tokenizer", "Fetch a tokenizer."), ("checkpoint", "Fetch weights, config and tokenizer.")):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("repo", metavar="REPO", help="on the hub, such as meta-llama/Llama-3.1-8B")
        command.add_argument("--revision", metavar="NAME", help="a branch, a tag or a commit; main if not given")
        command.add_argument(
            "--to", type=Path, metavar="DIR", help="a folder for the files; Hugging Face's own cache if not given"
        )
        if name == "checkpoint":
            command.add_argument(
                "--original", action="store_true", help="Meta's own files (original/*.pth) in the safetensors' stead"
            )
    return parser


def download(repo: str, what: str, revision: str | None, to: Path | None, original: bool = False) -> Iterator[str]:
    """Fetch a tokenizer or a checkpoint.

    Args:
        repo: Owner and name on the hub.
        what: tokenizer or checkpoint.
        revision: Branch, tag or commit.
        to: Where to; None is Hugging Face's cache.
        original: With a checkpoint: Meta's own files instead of safetensors.

    Yields:
        What a person wants to know, as lines; the last ones are the words to train with.

    Raises:
        CommandError: If it could not be fetched. Says why, and what to do.
    """
    huggingface_hub.logging.set_verbosity_error()
    is_reached = False
    try:
        found = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        is_reached = True
        sizes = {file.rfilename: file.size or 0 for file in found.siblings or []}
        chosen = choose_files(repo, list(sizes), what, original)
        total = sum(sizes[name] for name in chosen)
        yield f"{repo} at {found.sha}: {len(chosen)} file{'s' * (len(chosen) != 1)}, {_size(total)}"
        folder = Path(
            huggingface_hub.snapshot_download(
                repo, revision=found.sha, local_dir=to, allow_patterns=[_literal(name) for name in chosen]
            )
        )
    except TitanError:
        raise
    except Exception as error:
        _explain(error, repo, revision, to, is_reached)
    missing = [
        name for name in chosen if not (folder / name).is_file() or (folder / name).stat().st_size != sizes[name]
    ]
    if missing:
        raise CommandError(f"{missing[0]} did not arrive whole in {folder}\n  Try  the same command again")
    yield f"It is in {folder}"
    yield from describe_use(folder, chosen, what, original)


def choose_files(repo: str, there: list[str], what: str, original: bool) -> list[str]:
    """Return the files of a repository to fetch.

    Raises:
        CommandError: If it has none of what was asked for.
    """
    tokenizer = [name for name in (*_TOKENIZER, *_BESIDE) if name in there]
    if what == "tokenizer":
        if not set(tokenizer) & set(_TOKENIZER):
            raise CommandError(
                f"{repo} has no tokenizer: neither {', '.join(_TOKENIZER[:-1])} nor {_TOKENIZER[-1]}\n"
                f"  It has {_some(there)}."
            )
        return tokenizer
    if original:
        weights = [name for name in there if name.startswith("original/")]
        if not any(fnmatch(name, "*.pth") for name in weights):
            raise CommandError(f"{repo} has no original/*.pth\n  Try  the same command without --original")
        return [*weights, *(name for name in tokenizer if name not in weights)]
    all_weights = [name for name in there if name.endswith(".safetensors") and "/" not in name]
    weights = [name for name in all_weights if name.startswith("model")] or all_weights  # others may be copies
    if not weights or "config.json" not in there:
        lacking = "no safetensors" if not weights else "no config.json"
        hint = ""
        if any(fnmatch(name, "*.bin") for name in there):
            hint = "\n  Its weights are pickles (*.bin). Many have a copy on a branch:  --revision refs/pr/1"
        elif any(fnmatch(name, "original/*.pth") for name in there):
            hint = "\n  Try  --original   for Meta's own files"
        raise CommandError(f"{repo} has {lacking}\n  It has {_some(there)}.{hint}")
    return [*weights, *(name for name in _MODEL if name in there), *tokenizer]


def describe_use(folder: Path, names: list[str], what: str, original: bool) -> Iterator[str]:
    """Yield the words to train with what was fetched."""
    kinds: dict[TokenizerKind, Path] = {}
    for name in ("tokenizer.model", "original/tokenizer.model", "tokenizer.json"):
        if name in names and (guessed := guess_kind(folder / name)) is not None:
            kinds.setdefault(guessed[0], folder if name == "tokenizer.json" else folder / name)
    choices = [f"tokenizer={kind.name} {_override('tokenizer.path', path)}" for kind, path in kinds.items()]
    if what == "checkpoint" and original:
        source = shlex.quote(str(folder / "original"))
        yield f"Import the weights with  python -m titan.convert import {source} CHECKPOINT"
        yield "Train with   checkpoint.initial_load=CHECKPOINT"
    elif what == "checkpoint":
        yield f"Train with   {_override('checkpoint.initial_load', folder)}"
    for index, choice in enumerate(choices):
        yield f"{'or' if index else 'and' if what == 'checkpoint' else 'Train with':<12} {choice}"


def _explain(error: BaseException, repo: str, revision: str | None, to: Path | None, is_reached: bool) -> NoReturn:
    """Raise what an error of the hub's client means, in words that have no secret in them.

    Raises:
        CommandError: For all that can go wrong on the way.
        BaseException: The error itself, if it is a defect.
    """
    chain = _chain(error)
    has_token = huggingface_hub.get_token() is not None
    endpoint = urlsplit(constants.ENDPOINT)
    host = endpoint.hostname or "the hub"
    site = f"{endpoint.scheme}://{endpoint.netloc.rpartition('@')[2]}"  # without a password that may stand in it
    page = f"{site}/{repo}"
    where = f"{repo} at {revision}" if revision else repo
    response = next((each.response for each in chain if isinstance(each, errors.HfHubHTTPError)), None)
    status = getattr(response, "status_code", None)

    def is_any(*types: type[BaseException]) -> bool:
        return any(isinstance(each, types) for each in chain)

    if is_any(errors.HFValidationError):
        text = f"{repo} is no name of a repository\n  Try  OWNER/NAME, such as meta-llama/Llama-3.1-8B"
    elif is_any(errors.OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set, so nothing can be fetched\n  Try  HF_HUB_OFFLINE=0"
    elif is_any(errors.GatedRepoError) and has_token:
        text = (
            f"{repo} is gated, and the account of this token has no access to it\n"
            f"  Accept its licence at {page} and wait for access to be granted.\n"
            "  A fine-grained token also needs the permission to read gated repositories."
        )
    elif is_any(errors.GatedRepoError):
        text = (
            f"{repo} is gated, and there is no token\n"
            f"  Accept its licence at {page}, make a token at {site}/settings/tokens,\n"
            "  and  export HF_TOKEN=...   or  hf auth login"
        )
    elif status == 401 and has_token:
        text = (
            f"{host} does not take this token: it is wrong or was revoked\n  Try  export HF_TOKEN=...   with a new one"
        )
    elif is_any(errors.RevisionNotFoundError):
        text = f"{repo} has no revision {revision}\n  Try  --revision main   or one of {page}/tree/main"
    elif is_any(errors.RepositoryNotFoundError):
        text = f"{repo} does not exist on {host}, or is private and " + (
            "not for the account of this token" if has_token else "there is no token\n  Try  export HF_TOKEN=..."
        )
    elif status == 403:
        text = f"{host} does not permit it (403): {where}\n  The token needs the permission to read this repository."
    elif status is not None:
        text = f"{host} answers {status} for {where}\n  Try  the same command later; files that are whole stay"
    elif (local := next((each for each in chain if _is_local(each)), None)) is not None:
        text = _explain_storage(local, to)
    elif any(type(each).__name__ in ("LocalProtocolError", "UnicodeEncodeError") for each in chain):
        text = "the token has characters that no token has\n  Try  export HF_TOKEN=...   without blanks or line feeds"
    elif any(type(each).__module__.startswith(("httpx", "hf_xet")) for each in chain) or is_any(ConnectionError):
        text = f"the connection to {host} broke in the middle\n  Try  the same command again; files that are whole stay"
        if not is_reached:
            text = f"{host} cannot be reached\n  Is this machine online? HTTPS_PROXY and HF_ENDPOINT lead elsewhere."
    elif is_reached and is_any(OSError, RuntimeError):  # a file of the wrong size, and what Xet's client raises
        text = f"{where} did not arrive whole\n  Try  the same command again; files that are whole stay"
    else:
        raise error
    raise CommandError(text) from error


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _is_local(error: BaseException) -> bool:
    """Whether it is the disk's and not the network's."""
    return (
        isinstance(error, OSError)
        and not isinstance(error, (ConnectionError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError))
        and error.errno in _STORAGE
    )


_STORAGE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
    *(errno.EIO, errno.ENAMETOOLONG, errno.EFBIG),
)


def _explain_storage(error: BaseException, to: Path | None) -> str:
    assert isinstance(error, OSError)
    folder = to or constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder} is full ({error.strerror})\n  Try  --to /path/with/space   or, with room made, the same again"
    return f"{folder} cannot be written: {error.strerror}\n  Try  --to /path/to/write/to"


def _override(key: str, path: Path) -> str:
    return shlex.quote(f"{key}={path.absolute()}")


def _literal(name: str) -> str:
    """Return the pattern that stands for one file's name alone."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "no files"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


if __name__ == "__main__":
    main()
