"""origin: a base model of the hub: which commit is meant, whether it may be had, what fetching it takes.

Everything goes through huggingface_hub, so HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they
mean elsewhere. A base model that is a folder has nothing to do with any of this.

Fork me to: fetch weights from elsewhere (`fetch`).
"""
import json
import shutil
from pathlib import Path

from lib.run import terminal
from lib.run.errors import StageError, one_line

GIB = 2**30
CODE_MAPS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def commit(base_model: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of the hub means; None where neither hub nor cache can say.

    It asks for config.json, which a gated model refuses; model_info would answer even for that.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    silence()
    try:
        return Path(hf_hub_download(base_model, "config.json", revision=revision)).parent.name
    except LocalEntryNotFoundError as error:
        terminal.warn(f"{refusal(base_model, revision, error).what}: revision stays {revision or 'main'}")
        return None
    except HfHubHTTPError as error:
        raise refusal(base_model, revision, error) from None


def silence() -> None:
    """Keep the hub's library from saying each try of its own: what fails is said once, in the end."""
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()


def refusal(base_model: str, revision: str | None, error: BaseException | None) -> StageError | None:
    """The StageError that explains the hub's refusal behind an error; None where there is none behind it."""
    from huggingface_hub import constants, errors
    page, login = f"{constants.ENDPOINT}/{base_model}", "`hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        if error.response.status_code == 403:
            return StageError(f"base_model: {base_model} is gated, and your token has no access to it",
                              f"ask for access at {page}; with another token: {login}")
        return StageError(f"base_model: {base_model} is gated: its licence has to be accepted first",
                          f"accept it at {page}, then say who you are: {login}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return StageError(f"base_model: {constants.ENDPOINT} has no {base_model}, or it is private",
                          f"correct base_model; for a private one: {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return StageError(f"revision: {base_model} has no {revision}",
                          f"name a branch, a tag or a commit of {page}/commits/main")
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} is silent"
        return StageError(f"base_model: {base_model} is not whole in {constants.HF_HUB_CACHE}, and {why}",
                          "fetch it where there is a network; HF_HOME says where the cache is")
    if isinstance(error, errors.EntryNotFoundError):
        return StageError(f"base_model: {base_model} has no config.json, so transformers can't load it",
                          f"name the converted checkpoint, if there is one: {page}")
    return refusal(base_model, revision, error.__cause__) if error is not None else None


def fetch(base_model: str, revision: str | None, names: list[str]) -> Path:
    """The folder with these files of a base model; a hub's are downloaded, after saying how much that is."""
    if Path(base_model).is_dir():
        return Path(base_model)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError, HTTPError
    wanted = {"repo_id": base_model, "revision": revision, "allow_patterns": names}
    try:
        missing = [file for file in snapshot_download(**wanted, dry_run=True) if file.will_download]
        if missing:
            say_download(base_model, Path(constants.HF_HUB_CACHE), [file.file_size for file in missing])
    except DryRunError:                                           # no network: what is in the cache has to do
        pass
    try:
        return Path(snapshot_download(**wanted))
    except (OSError, HTTPError) as error:
        raise refusal(base_model, revision, error) or StageError(
            f"base_model: {base_model}: the download was cut off: {one_line(error)}",
            "run the same command again: files that are whole stay in the cache") from None


def say_download(base_model: str, cache: Path, sizes: list[int]) -> None:
    """Say what a download takes; raise StageError where the cache's disk has no room for it."""
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    size, free = sum(sizes), shutil.disk_usage(there).free
    room = f"{free / GIB:,.2f} GiB free in {cache}"
    if free < size:
        raise StageError(f"base_model: {base_model} takes {size / GIB:,.2f} GiB more, and there are {room}",
                         "make room, or name another folder for the cache: HF_HOME")
    terminal.say(f"downloading {base_model}: {len(sizes)} files, {size / GIB:,.2f} GiB; {room}; "
                 "if it is cut off, the same command goes on with the files that are missing")


def say_code(base_model: str, revision: str | None) -> None:
    """Name the checkpoint's files that `trust_remote_code` lets run, with those that they import."""
    from transformers.dynamic_module_utils import get_relative_import_files
    from transformers.utils import cached_file
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    files = set()
    for name in CODE_MAPS:
        if found := cached_file(base_model, name, **options):
            code = json.loads(Path(found).read_text(encoding="utf-8")).get("auto_map", {}).values()
            entries = [each for entry in code for each in (entry if isinstance(entry, list) else [entry])]
            files |= {f"{entry.rpartition('.')[0]}.py" for entry in entries if entry}
    for name in [name for name in files if "--" not in name]:      # a "--" names another repository's file
        if found := cached_file(base_model, name, **options):
            files |= {Path(other).name for other in get_relative_import_files(found)}
    words = f"runs code that comes with {base_model}: {', '.join(sorted(files))}" if files else \
        f"{base_model} brings no code to run"
    terminal.warn(f"trust_remote_code: {words}")
