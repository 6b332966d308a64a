"""hub: rows of data sets that the library `datasets` loads: from the hub, its cache, or a saved folder."""
from pathlib import Path

from lib.config.paths import BUILDERS, is_data_id
from lib.run.errors import StageError, one_line


def saved(path: Path, spec: dict) -> list:
    """The data sets of a folder that datasets' save_to_disk wrote, cut to the rows of the entry's split."""
    import datasets
    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, KeyError, OSError) as error:
        raise StageError(f"datasets: {path}: not a whole saved data set ({one_line(error)})",
                         "write the folder again with datasets' save_to_disk") from None
    splits = found if isinstance(found, datasets.DatasetDict) else \
        {name: found for name in names_in(spec["split"]) or ["train"]}
    split = spec["split"] or (next(iter(splits)) if len(splits) == 1 else None)
    if split is None or set(names_in(split)) - set(splits):
        other = f"not {split!r}" if split else "and the recipe names none"
        raise StageError(f"datasets: {path} has the splits {', '.join(splits)}, {other}",
                         f"write split: {next(iter(splits))}")
    splits = {name: undecoded(rows) for name, rows in splits.items() if name in names_in(split)}
    chosen = places(spec | {"split": split}, {name: len(rows) for name, rows in splits.items()})
    return [splits[name].select(taken) for name, taken in chosen]


def loaded(spec: dict):
    """The data set that datasets.load_dataset gives: of the hub, of its cache, or of files of any kind."""
    import datasets
    from datasets.exceptions import DatasetsError
    datasets.disable_progress_bars()
    path, split = spec["path"], spec["split"]
    if path in BUILDERS and not spec["data_files"]:        # datasets would take every file below this folder
        raise StageError(f"datasets: {path}: names a kind of file, and no file", "add data_files: FILE")
    try:
        found = datasets.load_dataset(path, spec["name"], revision=spec["revision"], split=split,
                                      data_files=spec["data_files"])
    except (DatasetsError, OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        fix = "correct path, name, revision, data_files or split; a hub id is owner/name"
        if is_data_id(path) and (datasets.config.HF_HUB_OFFLINE or isinstance(error, ConnectionError)):
            fix = "load it once where there is a network, without HF_HUB_OFFLINE; or name a file that is here"
        why = one_line(error.__cause__ or error)
        raise StageError(f"datasets: {path}: can't be loaded: {why}", fix) from None
    if isinstance(found, datasets.DatasetDict):
        if len(found) > 1:
            raise StageError(f"datasets: {path} has the splits {', '.join(found)}", "write which: "
                             f"split: {next(iter(found))}")
        found = next(iter(found.values()))
    return undecoded(found)


def undecoded(found):
    """A data set whose columns give media as bytes and paths, for lib/media/media.py to decode."""
    import datasets
    for column, feature in found.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, (datasets.Image, datasets.Audio, datasets.Video)):
            plain = type(inner)(decode=False)
            found = found.cast_column(column, plain if inner is feature else datasets.List(plain))
    return found


def names_in(split: str | None) -> list[str]:
    """The names in a split: of train[:1%]+test, train and test."""
    return [piece.partition("[")[0].strip() for piece in split.split("+")] if split else []


def places(spec: dict, sizes: dict[str, int]) -> list[tuple[str, range]]:
    """[(a split's name, row numbers)] that an entry's split takes; sizes: {split: its rows}."""
    import datasets
    try:
        taken = datasets.ReadInstruction.from_spec(spec["split"]).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise StageError(f"datasets: {spec['path']}: split {spec['split']}: {one_line(error)}",
                         "write train, train[:500], train[90%:] or a sum of these") from None
    return [(each.splitname, range(*slice(each.from_, each.to).indices(sizes[each.splitname])))
            for each in taken]
