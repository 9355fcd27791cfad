"""The fake's process: flags, keys, HTTP, its worker. See the package."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import mmap
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sglang import Faults
from sglang.scheduler import Scheduler
from sglang.weights import checksum_of

ADMIN = (
    "/abort_request", "/pause_generation", "/continue_generation", "/update_weights_from_disk", "/weights_checker",
    "/flush_cache", "/load_lora_adapter", "/unload_lora_adapter", "/begin_weight_update", "/end_weight_update",
    "/update_weights_from_tensor",
)  # fmt: skip
HANG_UP = 0
Answer = tuple[int, Any]


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch_server.py", allow_abbrev=False)
    for name in ("config", "model-path", "host", "device", "grammar-backend", "sampling-defaults", "log-level",
                 "attention-backend", "lora-backend", "dtype", "api-key", "admin-api-key"):  # fmt: skip
        parser.add_argument(f"--{name}")
    for name in ("port", "context-length", "max-running-requests", "max-total-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--max-lora-rank", type=int)
    parser.add_argument("--lora-target-modules", nargs="*")
    parser.add_argument("--custom-weight-loader", nargs="*", default=[])
    for name in (
        "enable-lora",
        "skip-tokenizer-init",
        "sleep-on-idle",
        "enable-deterministic-inference",
        "disable-overlap-schedule",
    ):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(words)
    if options.config:
        for line in Path(options.config).read_text().splitlines():
            key, _, value = line.partition(": ")
            setattr(options, key.replace("-", "_"), json.loads(value))
    return options


class Server:
    def __init__(self, options: argparse.Namespace, faults: Faults) -> None:
        self.options, self.faults = options, faults
        config = json.loads((Path(options.model_path) / "config.json").read_text())
        self.model_type = config["model_type"]
        self.scheduler = Scheduler(
            Path(options.model_path), vocab_size=config["vocab_size"], room=options.max_running_requests,
            max_tokens=options.max_total_tokens, overlap=not options.disable_overlap_schedule, faults=faults,
        )  # fmt: skip
        # cat ends when its standard input does: with this process, as SGLang's own workers do
        self.worker = subprocess.Popen(["sglang::scheduler"], executable="/bin/cat", stdin=subprocess.PIPE)
        self.calls: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []

    async def serve(self) -> None:
        server = await asyncio.start_server(self._connection, self.options.host, self.options.port)
        async with server:
            await self.scheduler.run(lambda: self.worker.poll() is None)
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split()
                # It does not look whether the caller has hung up; SGLang does every few seconds.
                status, answer = await self._call(method, path, headers, json.loads(content or b"{}"))
                if status == HANG_UP:
                    return
                data = json.dumps(answer).encode()
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _call(self, method: str, path: str, headers: dict[str, str], body: dict[str, Any]) -> Answer:
        if path == "/fake":
            return self._fake(body)
        key = headers.get("authorization", "").removeprefix("Bearer ")
        wanted = (path in ADMIN and self.options.admin_api_key) or self.options.api_key
        if wanted and key != wanted:
            return 401, {"error": "Unauthorized"}
        self.calls[path] += 1
        self.held[path] += 1
        try:
            while path in self.faults.hold:
                await asyncio.sleep(0.002)
        finally:
            self.held[path] -= 1
        if path in self.faults.refuse:
            return self.faults.refuse[path], {"error": {"message": "refused"}}
        if path in self.faults.garbage:
            return 200, ["nothing", "like", "it"]
        return await self._answer(path, body)

    async def _answer(self, path: str, body: dict[str, Any]) -> Answer:
        scheduler, options = self.scheduler, self.options
        if path == "/generate":
            self.bodies.append(dict(body))
            if body.get("lora_path") and body["lora_path"] not in scheduler.adapters:
                return 400, {"error": {"message": f"never been loaded: {body['lora_path']}"}}
            if self.faults.drop == ("sample" if body["sampling_params"]["max_new_tokens"] else "prefill"):
                self.faults.drop = ""
                return HANG_UP, None
            return 200, await scheduler.generate(body)
        if path == "/abort_request":
            scheduler.abort(body["rid"])
        elif path == "/pause_generation":
            scheduler.pause(body["mode"])
        elif path == "/continue_generation":
            await scheduler.resume()
        elif path == "/update_weights_from_disk":
            success, message = await scheduler.update(body)
            return 200 if success else 400, {"success": success, "message": message, "num_paused_requests": 0}
        elif path in ("/begin_weight_update", "/end_weight_update"):
            success = scheduler.session(path == "/begin_weight_update")
            return 200 if success else 400, {"success": success, "message": "" if success else "a session is open"}
        elif path == "/update_weights_from_tensor":
            assert body["load_format"] in options.custom_weight_loader
            success, message = await scheduler.update_few(body)
            return 200 if success else 400, {"success": success, "message": message}
        elif path == "/load_lora_adapter":
            failed = self.faults.fail_update or scheduler.load_adapter(body, options.max_lora_rank)
            return 400 if failed else 200, {"success": not failed, "error_message": failed}
        elif path == "/unload_lora_adapter":
            await scheduler.unload_adapter(body["lora_name"])
        elif path == "/weights_checker":
            checksum = checksum_of(scheduler.content)
            return 200, {"success": True, "message": "", "ranks": [], "per_engine_checksum": checksum}
        elif path == "/flush_cache":
            return 200 if scheduler.flush() else 400, "flushed"
        elif path == "/v1/loads":
            load = {
                "dp_rank": 0, "num_running_reqs": len(scheduler.running), "num_waiting_reqs": len(scheduler.waiting),
                "max_total_num_tokens": scheduler.max_tokens, "token_usage": scheduler.usage,
                "total_prefill_uncached_tokens": scheduler.prefilled,
                "decode_moments": [scheduler.steps, scheduler.decoded, 0.0],
            }  # fmt: skip
            return 200, {"loads": [] if self.faults.no_loads else [load]}
        elif path == "/server_info":
            parallel = {"tp_size": 1, "dp_size": 1, "pp_size": 1}
            return 200, {**vars(options), "version": self.faults.version, **parallel, **self.faults.says}
        elif path == "/model_info":
            return 200, {"model_path": options.model_path, "model_type": self.model_type, **self.faults.says}
        else:
            return 404, {"detail": "Not Found"}
        return 200, {}

    def _fake(self, body: dict[str, Any]) -> Answer:
        for name, value in body.items():
            assert hasattr(self.faults, name), name
            setattr(self.faults, name, value)
        if self.faults.die is not None:
            os._exit(self.faults.die)
        return 200, {
            "calls": self.calls, "held": self.held, "bodies": self.bodies, "pid": os.getpid(),
            "worker": self.worker.pid, "retracted": self.scheduler.retracted,
            "lengths": [len(sample.tokens) for sample in self.scheduler.running], "label": self.scheduler.label,
            "waiting": len(self.scheduler.waiting), "most": self.scheduler.most,
            "adapters": list(self.scheduler.adapters), "faults": dataclasses.asdict(self.faults),
        }  # fmt: skip


def share_memory() -> mmap.mmap:
    """Map a file in /dev/shm, as SGLang does; nobody removes it when this process is killed."""
    with open(f"/dev/shm/sglang_fake_{os.getpid()}", "w+b") as file:
        file.truncate(4096)
        return mmap.mmap(file.fileno(), 4096)


def main() -> None:
    faults = Faults(**json.loads(os.environ.get("FAKE_SGLANG", "{}")))
    options = parse(sys.argv[1:])
    print(f"fake SGLang on port {options.port}", flush=True)
    if faults.die is not None:
        print("RuntimeError: the fake was told to die", file=sys.stderr, flush=True)
        sys.exit(faults.die)
    shared = share_memory()
    time.sleep(faults.slow_start_s)
    asyncio.run(Server(options, faults).serve())
    shared.close()


if __name__ == "__main__":
    main()
