"""headway-learner demo: make a model and data, write two configurations, run the public commands on them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from learner.config.section import Section
from learner.demo.pair import free_port_pair, run_pair
from learner.demo.recipes import SGLANG_MEMORY, Recipe, recipes, to_toml, write_jsonl
from protocol.errors import ConfigError
from protocol.settings import load_settings


class DemoOptions(Section):
    """Train a small model on this machine: a real server process and a real learner process on loopback."""

    task: Literal["add", "sort"] = "add"
    """add: a real language model of 135M parameters learns two-digit addition (downloads 93 MB once). sort: a tiny
    model made on the spot learns to sort letters (no download)."""
    engine: Literal["auto", "sglang", "transformers"] = "auto"
    """What samples the rollouts. auto: SGLang where there is a GPU and SGLang, else transformers."""
    server_python: Path | None = None
    """The Python that runs the server, for SGLang may live in another environment; default is this one."""
    max_steps: int | None = Field(None, ge=1)
    """Training steps; default is the recipe's."""
    max_staleness: int = Field(4, ge=0)
    """The staleness dial; 0 is synchronous."""
    seed: int = Field(0, ge=0)
    """Of the data, of sampling and of the training."""
    run_name: str = ""
    """Default: the first free of demo-TASK-1, demo-TASK-2, ... A run of that name is continued."""
    output_dir: Path = Path("runs")
    """The run directory is output_dir/run_name."""
    cache_dir: Path = Path("build/demo")
    """Models are made here once and found again."""


def demo(argv: Sequence[str], *, prog: str) -> int:
    """Run a demonstration to its end; return the exit code.

    Raises:
        ConfigError: A wrong flag, or no Python at server_python.
        PreparationFailed: The model cannot be fetched or built.
    """
    options = load_settings(DemoOptions, argv, prog=prog)
    # One thread for this process and each child: with two on two busy cores, torch was seen 50 times slower.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    recipe, server_python = recipes()[options.task], _server_python(options)
    print(f"demo {options.task}: {recipe.summary}", flush=True)
    cache = options.cache_dir.resolve() / options.task
    if not (cache / "model").exists():
        print(f"making the model in {cache / 'model'} (once) ...", flush=True)
        recipe.prepare_model(cache)
    run_dir = (options.output_dir / _run_name(options)).resolve()
    write_run(recipe, options, run_dir=run_dir, model=cache / "model", port=free_port_pair())
    server = ["--config", str(run_dir / "server.toml")]
    learner = ["train", "--config", str(run_dir / "learner.toml")]
    print(f"\n  headway-server {' '.join(server)}\n  headway-learner {' '.join(learner)}\n", flush=True)
    code = run_pair(
        [server_python, "-m", "rollout_server", *server],
        [sys.executable, "-m", "learner", *learner],
        server_log=run_dir / "logs" / "server.log",
    )
    if code == 0:
        summary = json.loads((run_dir / "summary.json").read_text("utf-8"))
        print(describe_summary(summary, run_dir))
    return code


def write_run(recipe: Recipe, options: DemoOptions, *, run_dir: Path, model: Path, port: int) -> None:
    """Write data and both configurations into the run directory; paths in them are absolute."""
    data = run_dir / "data"
    data.mkdir(parents=True, exist_ok=True)
    train, evaluation = recipe.make_rows(options.seed)
    write_jsonl(data / "train.jsonl", train)
    write_jsonl(data / "eval.jsonl", evaluation)
    address = f"tcp://127.0.0.1:{port}"
    server = {"learner": address, "name": "demo-server", "model": str(model), "engine": options.engine, **recipe.server}
    if options.engine == "sglang":
        server["sglang"] = SGLANG_MEMORY
    learner = {
        "bind": address,
        "model": str(model),
        "dataset": str(data / "train.jsonl"),
        "eval_dataset": str(data / "eval.jsonl"),
        "output_dir": str(run_dir.parent),
        "run_name": run_dir.name,
        **recipe.learner,
        "max_staleness": options.max_staleness,
        "max_steps": options.max_steps or recipe.learner["max_steps"],
        "seed": options.seed,
    }
    (run_dir / "server.toml").write_text(to_toml(server), "utf-8")
    (run_dir / "learner.toml").write_text(to_toml(learner), "utf-8")


def describe_summary(summary: dict[str, Any], run_dir: Path) -> str:
    """What was learned, and where everything is; the learner has just said the rest."""
    lines = {
        "accuracy": f"{summary['eval_first']:.3f} -> {summary['eval_last']:.3f} on the evaluation prompts",
        "staleness": f"{summary['staleness_max']} at most, the bound is {summary['max_staleness']}",
        "run": f"{run_dir}",
        "model": f"AutoModelForCausalLM.from_pretrained({summary['checkpoint']!r})",
    }
    return "\n" + "\n".join(f"  {name:<11}{text}" for name, text in lines.items())


def _server_python(options: DemoOptions) -> str:
    if options.server_python is None:
        return sys.executable
    found = shutil.which(options.server_python)
    if found is None:
        raise ConfigError(
            f"server_python {options.server_python}: no program is there; name a python with headway in it"
        )
    return os.path.abspath(
        found
    )  # not resolved: a virtual environment's python is a link, and knows itself by its name


def _run_name(options: DemoOptions) -> str:
    if options.run_name:
        return options.run_name
    number = 1
    while (options.output_dir / f"demo-{options.task}-{number}").exists():
        number += 1
    return f"demo-{options.task}-{number}"
