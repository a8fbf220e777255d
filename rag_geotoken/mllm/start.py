"""This module starts and stops a vLLM server for the folder of a model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from rag_geotoken.errors import GeoError
from rag_geotoken.photos.pictures import UNPRINTABLE

# Nothing is fetched or reported; a gigabyte for the cache of keys and values on a CPU, where compiling costs more time
# than it saves a small model.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
IMAGES = 16  # a prompt at most
READY_S = 300.0
STOP_S = 20.0


class VllmServer:
    """This context manager serves a model's folder on this machine alone, under the folder's name.

    folder: The model. python: That of the environment that vLLM is installed in (``make .venv-vllm``). log: The file
    that takes the server's output. ``url`` is for a client. Raises GeoError where the interpreter is missing.
    """

    def __init__(self, folder: Path, python: Path | str, log: Path) -> None:
        python, self.log = Path(python).absolute(), log.absolute()
        if not python.is_file():
            raise GeoError(f"there is no {python}: make .venv-vllm sets up an environment with vLLM")
        with socket.socket() as probe:  # finds a free port
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        model = folder.resolve()
        # The package for CPUs has no `vllm serve`: that looks for a distribution of the other's name.
        self.command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self.command += ["--served-model-name", model.name]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), "--seed", "0"]
        self.command += ["--limit-mm-per-prompt", json.dumps({"image": IMAGES})]
        if on_cpu():
            self.command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"]

    def __enter__(self) -> VllmServer:
        """Start the server. Raises GeoError where it ended, or was not ready within five minutes."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server and all that it started."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        self.kill()

    def start(self) -> None:
        """Start the server, again where it was killed, and wait until it is ready. Raises GeoError when it never is."""
        own = ("PYTHONPATH", "PYTHONHOME")  # they are for our own environment
        environment = {name: value for name, value in os.environ.items() if name not in own}
        environment |= ENVIRONMENT if on_cpu() else {}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.log.parent,
                start_new_session=True,  # so that it and its children can be killed as one
            )
        try:
            begun = time.monotonic()
            while self.process.poll() is not None or not self._healthy():
                if self.process.poll() is not None:
                    error = _last_error(self.log)
                    raise GeoError(f"the vLLM server ended before it was ready ({error}): see {self.log}")
                if time.monotonic() - begun >= READY_S:
                    raise GeoError(f"the vLLM server was not ready within {READY_S:g} s: see {self.log}")
                time.sleep(0.5)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Kill the server and all that it started, as a machine that runs out of memory would."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _healthy(self) -> bool:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False


def on_cpu() -> bool:
    """Tell whether this machine has no NVIDIA GPU, as far as its tools know."""
    return shutil.which("nvidia-smi") is None


def _last_error(log: Path) -> str:
    """Return the last line of a log that names an error, or its last line at all."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line]
    return UNPRINTABLE.sub(" ", (errors or lines or ["it said nothing"])[-1]).strip()[:200]
