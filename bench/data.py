"""data: how many rows 02_data measures a second, and what memory it takes, by the number of rows.

    python -m bench.data --rows 1000 10000 100000            # texts of about 128 tokens
    python -m bench.data --rows 1000 10000 --pictures        # each with a picture of 64 x 48 pixels

Every size is a run of 01 and 02 on a tiny Qwen2.5-VL. Seconds are those that stage.json tells: the whole stage with
its pages, without the start of Python. Memory is that of all its processes together, at its highest, a page that
several share counted once (Linux: Pss_Anon, looked at five times a second); pages of mapped files are left out, since
a machine may drop them.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from bench.machine import ROOT

WORDS = "what follows is a plain row of words that somebody wrote about nothing at all and more".split()
EACH = 10                                 # words of a question and of an answer: 128 tokens with the template's


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--processes", type=int, help="dataset_processes; left out: one for each core")
    args = parser.parse_args()
    print(f"{'rows':>9}  {'seconds':>8}  {'rows/s':>7}  {'peak MiB':>8}  tokens a row", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch, "base")
        subprocess.run([sys.executable, "-c", "import sys; from tests.zoo import build; from pathlib import Path; "
                        "build('qwen2_5_vl', Path(sys.argv[1]))", base], cwd=ROOT, check=True, capture_output=True)
        for number in args.rows:
            seconds, peak, tokens = measured(Path(scratch, f"n{number}"), base, number, args)
            print(f"{number:9,}  {seconds:8.1f}  {number / seconds:7,.0f}  {peak:8,.0f}  {tokens:.0f}", flush=True)


def measured(folder: Path, base: Path, number: int, args) -> tuple[float, float, float]:
    """(seconds of 02, its peak in MiB, tokens of a row) on so many rows."""
    folder.mkdir()
    write_rows(folder, number, args.pictures)
    recipe = {"base_model": str(base), "datasets": [{"path": str(folder / "rows.jsonl")}], "adapter": "lora",
              "dataset_processes": args.processes}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = {"cwd": ROOT, "env": env, "stdout": subprocess.DEVNULL}
    subprocess.run([sys.executable, "01_config.py", folder / "recipe.yaml", folder / "run"], check=True, **words)
    peak = 0
    process = subprocess.Popen([sys.executable, "02_data.py", folder / "run"], **words)
    while process.poll() is None:
        peak = max(peak, sum(map(own_kib, family_of(process.pid))))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit("02_data stopped")
    report, stage = (json.loads((folder / "run/02_data" / name).read_text(encoding="utf-8"))
                     for name in ("report.json", "stage.json"))
    return stage["seconds"], peak / 1024, report["counts"]["input_tokens"] / number


def write_rows(folder: Path, number: int, pictures: bool) -> None:
    """Rows of one question and answer, and a picture of its own for each where there are to be some."""
    pick = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for n in range(number):
            question, answer = (" ".join(pick.choices(WORDS, k=EACH)) for _ in range(2))
            row = {"prompt": question, "completion": answer}
            if pictures:
                Image.frombytes("RGB", (64, 48), pick.randbytes(3 * 64 * 48)).save(folder / f"{n}.jpg")
                row["image"] = f"{n}.jpg"
            file.write(json.dumps(row) + "\n")


def family_of(pid: int) -> list[int]:
    """A process and those that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []                                                # it has just ended
    return [pid, *(each for child in children for each in family_of(int(child)))]


def own_kib(pid: int) -> int:
    """The memory of a process that is no file's, shared pages by its share of them, in KiB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss_Anon")), 0)


if __name__ == "__main__":
    main()
