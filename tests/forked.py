"""Python commands as separate processes, forked from a server that has already done the imports.

All workers of a pytest run share one server (tests/conftest.py starts it).
"""

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ADDRESS = "TINYFLUX_FORK_SERVER"
"""The environment variable with the path of the server's socket."""
IMPORTS = (
    "huggingface_hub.constants",
    "tinyflux.model.zoo",
    "tinyflux.precache.from_images",
    "tinyflux.trainer.start",
    "torch._inductor.compile_fx",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "torchao.optim",
)


@contextmanager
def fork_server() -> Iterator[None]:
    """Start the server; it imports nothing before its first request."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ADDRESS] = f"{folder}/socket"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(os.environ[ADDRESS])
            listener.listen(64)
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
            argv = [sys.executable, __file__, str(listener.fileno())]
            fds = (listener.fileno(),)
            with open(f"{folder}/log", "wb") as log:
                server = subprocess.Popen(
                    argv, env=env, pass_fds=fds, stdin=subprocess.PIPE, stderr=log, start_new_session=True
                )
        try:
            yield
        finally:
            server.communicate()


class Forked:
    """`python ARGV...` in its own process group, with some attributes and methods of `subprocess.Popen`.

    The process is killed when the last reference to this object is deleted. argv: a script, -m and a module, or -c and
    code, and its arguments. log: a file to which both outputs are appended, instead of `stdout`. file_limit: largest
    size of a file that it can write, in bytes.
    """

    def __init__(
        self,
        argv: Sequence[object],
        env: dict[str, str],
        *,
        cwd: Path | None = None,
        log: Path | None = None,
        file_limit: int | None = None,
    ):
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(os.environ[ADDRESS])
        if log:
            self.stdout, output = None, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        else:
            reader, output = os.pipe()
            self.stdout = os.fdopen(reader, encoding="utf-8", errors="replace")
        request = {"argv": list(map(str, argv)), "env": env, "cwd": str(cwd or Path.cwd()), "file_limit": file_limit}
        socket.send_fds(self._server, [json.dumps(request).encode()], [output])
        os.close(output)
        told = self._server.recv(64)
        if not told:
            raise RuntimeError(f"the server failed:\n{Path(os.environ[ADDRESS]).with_name('log').read_text()}")
        self.pid = int(told)

    def poll(self, timeout: float | None = 0) -> int | None:
        """The exit status, if the process ends within `timeout` seconds."""
        if self.returncode is None and select.select([self._server], [], [], timeout)[0]:
            self.returncode = int(self._server.recv(64))
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit status; after `timeout` seconds the process is killed, which gives -9."""
        if self.poll(timeout) is None:
            self.kill()
        return self.poll(None)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """The output; after `timeout` seconds the process is killed."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        with self.stdout:
            said = self.stdout.read()
        self.poll(None)
        timer.cancel()
        return said, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended, and its watcher has not told it yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def serve(listener: socket.socket) -> None:
    """Fork for every request, until stdin is closed. Returns only in the children, with their command in sys.argv."""
    imported = False
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            os._exit(0)
        client, _ = listener.accept()
        if not imported:
            for name in IMPORTS:
                importlib.import_module(name)
            gc.freeze()
            imported = True
        if os.fork() == 0:
            listener.close()
            message, (output,), _, _ = socket.recv_fds(client, 1 << 20, 1)
            watch(client, json.loads(message), output)
            return
        client.close()


def watch(client: socket.socket, request: dict, output: int) -> None:
    """Fork once more and tell the client the child's number and exit status. Returns in the child."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.read(ready, 1)  # wait until the client knows this process
        for fd in (ready, go, client.detach()):
            os.close(fd)
        prepare(**request, output=output)
        return
    os.close(output)
    client.send(str(pid).encode())
    os.write(go, b".")
    child = os.pidfd_open(pid)
    if client in select.select([child, client], [], [])[0]:  # the client is gone
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        client.send(str(status).encode())
    except BrokenPipeError:
        pass
    os._exit(0)


def prepare(argv: list[str], env: dict[str, str], cwd: str, file_limit: int | None, output: int) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd in (1, 2):
        os.dup2(output, fd)
    os.close(output)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    importlib.reload(sys.modules["huggingface_hub.constants"])  # they are read from the environment
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = argv


def run() -> None:
    """The command in sys.argv."""
    if sys.argv[0] in ("-m", "-c"):
        option, what = sys.argv[0], sys.argv.pop(1)
        sys.path[0] = os.getcwd()
        if option == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


def end(status: object) -> None:
    """End as an interpreter does, but free no objects: that would copy all the server's first, for half a second."""
    if status is None or isinstance(status, int):
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit((status or 0) & 0xFF)
    sys.exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers are not waited for
    serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        run()
    except SystemExit as error:
        end(error.code)
    end(0)
