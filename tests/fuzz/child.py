"""One command in a forked process: what it printed, took and wrote, and what is wrong with that."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MOST_CPU_SEC = 10  # of a command
MOST_WALL_SEC = 300  # of a case, beside other work: a command that waits forever
MOST_BYTES, BYTES_A_PIXEL = 100 * 2**20, 16  # above the start
MOST_ADDRESSES = 6 * 2**30  # that a command may map: the machine must survive a finding
WRITABLE = ("out", "cache", "tmp")  # folders of a case
# Audit events of Python that change files: which arguments are paths, and relative to what folder.
WRITES = {
    "os.mkdir": [(0, 2)], "os.remove": [(0, 1)], "os.rmdir": [(0, 1)], "os.truncate": [(0, None)],
    "os.rename": [(0, 2), (1, 3)], "os.link": [(1, 3)], "os.symlink": [(1, 2)],
    "os.chmod": [(0, 2)], "os.utime": [(0, 3)],
}  # fmt: skip
NOISE = re.compile(r"^(?!maskdm: ).*(Warning|Error\b|warn\(|Exception).*", re.M)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Case:
    """Files in a folder, and the commands that look at them.

    Attributes:
        commands: arguments of `maskdm`, run one after another; paths relative to the folder.
        pixels: of the largest image that may be decoded.
        codes: exit codes that are right.
        writable: folders of the case, besides `WRITABLE`, that the commands may write to.
        right: gets the folder and the outputs, and says what is wrong with them, if anything.
    """

    commands: list[list[str]]
    pixels: int = 0
    codes: Sequence[int] = (0, 1, 2)
    writable: Sequence[str] = ()
    right: Callable[[Path, list[str]], str | None] = lambda folder, outputs: None


@dataclass
class Result:
    """What a case took, and what is wrong with it.

    Attributes:
        problems: one line each; none if all is well.
        peak: bytes above the start, of the command that took most, without the picture's share.
        cpu_sec: processor time of the slowest command.
        report: outputs and tracebacks of all commands.
    """

    problems: list[str] = field(default_factory=list)
    peak: int = 0
    cpu_sec: float = 0.0
    report: str = ""


def run_case(case: Case, folder: Path) -> Result:
    """Runs a case's commands in a child; the parent must have imported what they need."""
    for name in (*WRITABLE, "home"):
        (folder / name).mkdir(exist_ok=True)
    before = _state(folder, case)
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_in_child(case, folder, writing)
    os.close(writing)
    lines = _read_until_end(child, reading)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    try:
        os.killpg(child, signal.SIGKILL)  # workers that are left
    except ProcessLookupError:
        pass
    result = _judged(case, folder, lines, os.waitstatus_to_exitcode(status))
    if changed := sorted(before.symmetric_difference(_state(folder, case))):
        result.problems.append(f"written outside its folders: {changed[0][0]!r}")
    return result


def _state(folder: Path, case: Case) -> set[tuple[str, int, int, int]]:
    """All files and folders of a case that its commands may not change, with size and time."""
    found, may_change = set(), {*WRITABLE, *case.writable, "log"}
    for top, folders, files in os.walk(folder) if "." not in case.writable else ():
        if Path(top) == folder:
            folders[:] = [name for name in folders if name not in may_change]
        for name in files + folders:
            path = os.path.join(top, name)
            state = os.lstat(path)
            is_top = name in folders
            found.add((path, state.st_mode, 0 if is_top else state.st_size, state.st_mtime_ns))
    return found


def _read_until_end(child: int, pipe: int) -> list[str]:
    """The lines that a child reports; it is killed after MOST_WALL_SEC."""
    content, end = b"", time.monotonic() + MOST_WALL_SEC
    while True:
        ready, *_ = select.select([pipe], [], [], max(0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            return [*content.decode().splitlines(), json.dumps({"hang": True})]
        if not (part := os.read(pipe, 65536)):
            return content.decode().splitlines()
        content += part


def _run_in_child(case: Case, folder: Path, pipe: int) -> None:
    """Runs the commands, reports a line of JSON for each, and leaves."""
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        os.environ.update(
            HOME=str(folder / "home"),
            TMPDIR=str(folder / "tmp"),
            MASKDM_CACHE=str(folder / "cache"),
            MPLCONFIGDIR=str(folder / "tmp"),
            HF_HUB_OFFLINE="1",
        )
        log = folder / "log"
        log.mkdir()
        writes = list[str]()
        _watch_writes(writes, [folder / name for name in (*WRITABLE, *case.writable, "log")])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = _status("VmSize") + MOST_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, arguments in enumerate(case.commands):
            for stream, descriptor in (("out", 1), ("err", 2)):
                path = log / f"{number}.{stream}"
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
            line = {**_run(arguments), "writes": writes[:3]}
            os.write(pipe, json.dumps(line).encode() + b"\n")
        os._exit(0)
    except BaseException:
        os.write(pipe, json.dumps({"broken": traceback.format_exc()}).encode() + b"\n")
        os._exit(9)


def _run(arguments: list[str]) -> dict[str, object]:
    """Runs a command in this process, and measures it.

    Memory is the peak without the pages of files, libraries above all, that are mapped by its end.
    """
    from maskdm.cli import main

    start = time.process_time()
    limit = int(start) + MOST_CPU_SEC + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    faulthandler.register(signal.SIGXCPU, all_threads=False, chain=True)  # where it was, then dies
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, trace = _status("RssAnon"), ""
    try:
        code = main(arguments)
    except BaseException:
        code, trace = -1, traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return {
        "code": code,
        "trace": trace,
        "bytes": _status("VmHWM") - _status("RssFile") - before,
        "cpu_sec": time.process_time() - start,
    }


def _watch_writes(writes: list[str], places: list[Path]) -> None:
    """Collects the paths outside of some places that Python opens to write, makes or removes."""
    allowed = (*(f"{place}{os.sep}" for place in places), "/dev/", "/proc/")
    exact = {str(place) for place in places}

    def note(path: object, folder: object = -1) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            above = os.readlink(f"/proc/self/fd/{folder}") if folder not in (-1, None) else ""
            whole = os.path.abspath(os.path.join(above, os.fsdecode(path)))
            if whole not in exact and not whole.startswith(allowed):
                writes.append(whole)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                note(path)
        elif event in WRITES:
            for path, folder in WRITES[event]:
                note(arguments[path], -1 if folder is None else arguments[folder])
        elif event == "pickle.find_class" and not _is_from_worker():
            writes.append(f"(unpickled: {arguments})")

    sys.addaudithook(watch)


def _is_from_worker() -> bool:
    """Whether what is unpickled now comes from a worker process, not from a file."""
    names = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe())]
    return any("multiprocessing" in name or "loky" in name for name in names)


def _status(name: str) -> int:
    """A size of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith(name)).split()[1])


def _judged(case: Case, folder: Path, lines: list[str], status: int) -> Result:
    """The result of a case, from what its child reported and printed."""
    result, outputs = Result(), list[str]()
    for number, arguments in enumerate(case.commands):
        texts = [_text(folder / "log" / f"{number}.{stream}") for stream in ("out", "err")]
        outputs.append(texts[0])
        line = json.loads(lines[number]) if number < len(lines) else {}
        result.report += f"$ maskdm {' '.join(map(repr, arguments))}\n{texts[0]}{texts[1]}\n"
        result.report += f"{line}\n{line.get('trace', '')}{line.get('broken', '')}\n"
        if "code" not in line:
            why = "no end in time" if "hang" in line or status == -signal.SIGXCPU else "died"
            result.problems.append(f"{arguments[0]}: {why} (status {status})")
            break
        result.problems += [f"{arguments[0]}: {one}" for one in _problems(case, line, *texts)]
        share = BYTES_A_PIXEL * case.pixels
        result.peak = max(result.peak, line["bytes"] - share)
        result.cpu_sec = max(result.cpu_sec, line["cpu_sec"])
    if not result.problems:
        try:
            wrong = case.right(folder, outputs)
        except (ValueError, KeyError) as error:
            wrong = f"an output that cannot be judged: {error!r}"
        result.problems += [f"wrong: {wrong}"] if wrong else []
    shutil.rmtree(folder / "log", ignore_errors=True)
    return result


def _problems(case: Case, line: dict, out: str, err: str) -> list[str]:
    """What is wrong with the end and the output of a command."""
    problems, code = [], line["code"]
    if line["trace"] or "Traceback" in err + out:
        last = (line["trace"] or err).strip().splitlines()[-1]
        problems.append(f"traceback: {last[:200]}")
    elif code not in case.codes:
        problems.append(f"exit code {code}: {err.strip()[-200:]}")
    elif code and not (code == 2 and "usable" in out and not err):  # the doctor's report
        last = err.splitlines()[-1] if err else ""
        if err.count("maskdm: ") != 1 or not last.startswith("maskdm: "):
            problems.append(f"no clear line: {err.strip()[-300:]!r}")
    if noise := NOISE.search(err):
        problems.append(f"noise: {noise[0][:300]}")
    if control := CONTROL.search(out + err):
        problems.append(f"a control character in the output: {control[0]!r}")
    if line["bytes"] > MOST_BYTES + BYTES_A_PIXEL * case.pixels:
        above = f"{BYTES_A_PIXEL} bytes a pixel of {case.pixels:,}"
        problems.append(f"memory: {line['bytes'] / 2**20:.0f} MiB above the start, with {above}")
    if line["cpu_sec"] > MOST_CPU_SEC:
        problems.append(f"{line['cpu_sec']:.1f} s of CPU")
    if line["writes"]:
        problems.append(f"written outside its folders: {line['writes']}")
    return problems


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""
