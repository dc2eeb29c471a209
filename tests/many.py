# SPDX-License-Identifier: Apache-2.0
"""Several processes of one run, started by hand: no launcher that would end the others where one is lost.

`python many.py WORLD SECONDS MODULE ROUNDS` imports the module once. For each round, a list of arguments, it forks
WORLD processes which call its `main(*arguments)`, and waits for all. It prints the exit codes of every round as JSON
(negative: the signal that ended one). After SECONDS the processes of a round that are left are killed, their code is
then -9; so are those that are stopped, once the others have ended.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
TESTS = Path(__file__).parent


def run_many(world, module, *arguments, seconds=100, **environment):
    """The exit codes and everything the processes printed."""
    codes, said = run_rounds(world, module, [arguments], seconds=seconds, **environment)
    return codes[0], said


def run_rounds(world, module, rounds, *, seconds=100, **environment):
    """The exit codes of every round, and everything that was printed."""
    told = json.dumps([[str(argument) for argument in arguments] for arguments in rounds])
    command = [sys.executable, str(Path(__file__)), str(world), str(seconds), str(module), told]
    paths = os.pathsep.join([str(TESTS.parent), str(Path(module).parent)])
    env = {**os.environ, **ONE_THREAD, "PYTHONPATH": paths, **environment}
    limit = seconds * len(rounds) + 60
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(lines[-1]), done.stdout + done.stderr


def read_all(folder, mode, world):
    return [json.loads((Path(folder) / f"{mode}-{rank}.json").read_text()) for rank in range(world)]


def connected():
    """Threads of connections to other processes; one that is left when the interpreter ends may abort it."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def load(file):
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def child(rank, world, port, module, arguments):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    code = 1
    try:
        module.main(*arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def one_round(world, seconds, module, arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            child(rank, world, port, module, arguments)
        started.append(pid)
    codes, stopped = {}, set()

    def end_the_rest(*_):
        for pid in started:
            if pid not in codes:
                os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end_the_rest)
    signal.alarm(seconds)
    while len(codes) < world:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            stopped.add(pid)
        else:
            codes[pid] = os.waitstatus_to_exitcode(status)
        if stopped and len(codes.keys() | stopped) == world:
            end_the_rest()
    signal.alarm(0)
    return [codes[pid] for pid in started]


def main(world, seconds, file, rounds):
    os.environ |= ONE_THREAD
    module = load(file)
    codes = [one_round(int(world), int(seconds), module, arguments) for arguments in json.loads(rounds)]
    print("\n" + json.dumps(codes), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
