"""What a refusal costs in a program that has just imported eqx_moe: `python tests/refusing.py`, for test_bad_input.py.

For each line on stdin, a JSON list of a function's name, a folder and options, it forks a process, which is as fresh as
one that has done nothing but its imports, and has no checks of types. That one loads, and writes the error's code, the
seconds, and the bytes of memory that it took at most.
"""

import json
import os
import pathlib
import signal
import sys
import time

SECONDS = 20  # until a process that hangs is ended


def peak_memory(reset: bool = False) -> int:
    """The most memory that this process has had since a reset, in bytes; always 0 where that is not to be had."""
    try:
        if reset:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    import eqx_moe
    import eqx_moe.hub

    functions = {f.__name__: f for f in (eqx_moe.from_pretrained, eqx_moe.load_config, eqx_moe.load_tokenizer)}
    for line in sys.stdin:
        name, folder, options = json.loads(line)
        process = os.fork()
        if not process:
            signal.alarm(SECONDS)
            code, before, started = "", peak_memory(reset=True), time.perf_counter()
            try:
                functions[name](pathlib.Path(folder), **options)
            except eqx_moe.CheckpointError as error:
                code = error.code
            seconds, memory = time.perf_counter() - started, peak_memory() - before
            print(json.dumps([code, seconds, memory]), flush=True)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if status:
            print(json.dumps([f"ended with {os.waitstatus_to_exitcode(status)}", 0, 0]), flush=True)


if __name__ == "__main__":
    main()
