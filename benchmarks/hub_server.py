"""Many clients at once: what `zoo serve` sends in total, against nginx with the same file, turn by turn.

    apt-get install nginx-light curl
    .venv/bin/python -m benchmarks.hub_server [--clients 16] [--size 200] [--rounds 5]

Clients are curl processes that throw away what they get. Memory is the server's own, resident, at its most
over all rounds and after each; one download of every round is checked against its sha256.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.hub import serving
from zoo.hub.store import HubStore, lfs_file
from zoo.machine import this_machine

NGINX = """
daemon off; pid {folder}/nginx.pid; error_log stderr error; worker_processes auto;
events {{ worker_connections 1024; }}
http {{
    access_log off; sendfile on; tcp_nopush on;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{ listen 127.0.0.1:{port}; root {folder}; }}
}}
"""


@contextmanager
def nginx(folder: Path, port: int) -> Iterator[str]:
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port))
    process = subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-p", folder])
    try:
        time.sleep(1)
        yield f"http://127.0.0.1:{port}/model.safetensors"
    finally:
        process.terminate()
        process.wait()


def fetch(url: str, clients: int, size: int) -> float:
    """Bytes per second of all clients together; every one of them must get all of the file."""
    command = ["curl", "--silent", "--fail", "--output", "/dev/null", "--write-out", "%{size_download}", url]
    begun = time.perf_counter()
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(clients)]
    for client in running:
        said, _ = client.communicate()
        if client.returncode or int(said) != size:
            raise SystemExit(f"a client of {url} failed: exit code {client.returncode}, {said} bytes")
    return clients * size / (time.perf_counter() - begun)


@contextmanager
def watching(pid: int, seen: list[float]) -> Iterator[None]:
    """Collect the resident megabytes of a process and its children."""
    stop = threading.Event()

    def watch() -> None:
        process = psutil.Process(pid)
        while not stop.wait(0.05):
            family = [process, *process.children(recursive=True)]
            seen.append(sum(one.memory_info().rss for one in family) / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--size", type=int, default=200, help="of the file, in megabytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=8751, help="for nginx")
    asked = parser.parse_args()
    if not shutil.which("nginx") or not shutil.which("curl"):
        sys.exit("nginx and curl are needed: apt-get install nginx-light curl")
    content = os.urandom(asked.size * 1_000_000)
    sha256 = hashlib.sha256(content).hexdigest()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # nginx may read it as another user
        (folder / "model.safetensors").write_bytes(content)
        hub = HubStore(folder / "store" / "hub")
        hub.receive(sha256, len(content), [content])
        repo = hub.create("models", "zoo/model")
        hub.commit(repo, "main", [lfs_file("model.safetensors", sha256, len(content))], title="a model")
        speeds: dict[str, list[float]] = {"zoo serve": [], "nginx": []}
        memory: list[float] = []
        after = []
        with serving(folder / "store") as server, nginx(folder, asked.port) as theirs:
            ours = f"{server.endpoint}/zoo/model/resolve/main/model.safetensors"
            for _ in range(asked.rounds):
                speeds["nginx"].append(fetch(theirs, asked.clients, len(content)))
                with watching(server.process.pid, memory):
                    speeds["zoo serve"].append(fetch(ours, asked.clients, len(content)))
                after.append(memory[-1])
                got = subprocess.run(["curl", "--silent", ours], stdout=subprocess.PIPE, check=True).stdout
                if hashlib.sha256(got).hexdigest() != sha256:
                    sys.exit("what was served is not what was stored")
    machine = this_machine()
    print(f"{asked.clients} clients, {asked.size} MB each, {machine.cpu}, {os.cpu_count()} CPUs")
    for name, found in speeds.items():
        rounds = " ".join(f"{one / 1e6:.0f}" for one in found)
        print(f"{name:10s} {statistics.median(found) / 1e6:6.0f} MB/s   rounds: {rounds}")
    ratio = statistics.median(speeds["zoo serve"]) / statistics.median(speeds["nginx"])
    print(f"zoo serve reaches {ratio:.0%} of nginx")
    print(
        f"memory: at most {max(memory):.0f} MB; after each round {' '.join(f'{one:.0f}' for one in after)} MB"
    )


if __name__ == "__main__":
    main()
