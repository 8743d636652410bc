"""The comparison: every method trained alike, measured alike, and saved as it goes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from baselines.comparison.bench import Bench, Measurement
from baselines.comparison.methods import DEFAULT, METHODS
from baselines.comparison.plan import Plan
from baselines.comparison.result import (
    Comparison,
    HostScores,
    MethodCost,
    MethodResult,
    MethodRun,
    Training,
)
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelSource
from pilotfish.evaluation.processes import is_main, on_main
from pilotfish.evaluation.results import Run, machine, versions
from pilotfish.evaluation.speed import denoiser_flops, speed_up, take_turns, timed_call
from pilotfish.guides import Guide
from pilotfish.pipelines.sampling import Attachable
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.stages import distill

BATCH = 8
"""Pictures at once where the wall clock is compared."""


class Comparing:
    """One comparison in one folder; it goes on where it stopped.

    Several processes train and draw together, and all of them must see the folder.

    Args:
        plan: what is compared.
        hosts: by name, first the base on which all methods are trained.
        how: how each is measured.
        scorer: the scorer.
        folder: the trainings and ``compare.json``.
        training: settings that every training shares, such as another base and its prompts.
        command: the command line that repeats it.
        notice: called with a line of text worth showing to a person.

    Raises:
        ConfigError: the folder holds a comparison of another plan; or equal seconds are wanted
            without the default, whose seconds they are.
    """

    def __init__(
        self, plan: Plan, hosts: Mapping[str, ModelSource], how: Measurement, scorer: Scorer,
        folder: Path, *, training: Mapping[str, Any], command: str,
        notice: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.plan, self.hosts, self.how, self.scorer = plan, hosts, how, scorer
        self.folder, self.training = folder, training
        self.notice = notice if is_main() else lambda line: None
        self.file = folder / "compare.json"
        if plan.equal_seconds and DEFAULT not in plan.methods:
            raise ConfigError(
                f"equal_seconds is as long as {DEFAULT} takes; compare it too, or use "
                "--no_equal_seconds"
            )
        run = Run(
            command, how.seed, plan.samples, plan.guidance_scale, plan.num_inference_steps,
            machine(), versions(),
        )  # fmt: skip
        # what goes in by its checksum: a path may hold something else by now
        trained_on = sorted((name, _content(value)) for name, value in training.items())
        given = repr((list(how.names), list(how.held_out), how.seed, trained_on))
        facts = plan.facts() | {"hosts": " ".join(hosts), "inputs": f"{crc32(given.encode()):08x}"}
        self.found = Comparison(DEFAULT, {}, {}, facts, run)
        if before := on_main(lambda: Comparison.load(self.file) if self.file.is_file() else None):
            if before.plan != self.found.plan:
                raise ConfigError(
                    f"{folder} holds a comparison with other settings; give it the same, or "
                    "another --output_dir"
                )
            self.found = before

    def run(self) -> Comparison:
        """Whatever of it is still missing."""
        for name, key in self._runs():
            self._train(name, key)
        for host in self.hosts:
            self._measure(host)
        if any(math.isnan(m.cost.cfg_over_method) for m in self._planned().values()):
            self._time()
        return self.found

    def _runs(self) -> Iterator[tuple[str, str]]:
        """Method and key of every run. All that see equal samples come first: only then is it
        known how long the default takes."""
        budgets = ("samples", "seconds") if self.plan.equal_seconds else ("samples",)
        for budget in budgets:
            for seed in self.plan.seeds:
                for name in self.plan.methods:
                    if METHODS[name].rule is None:
                        yield name, f"{budget}-{seed}"
                    elif budget == "samples" and seed == self.plan.seeds[0]:
                        yield name, "free"

    def _save(self) -> None:
        if is_main():
            self.found.save(self.file)

    # -- training -----------------------------------------------------------------------

    def _place(self, name: str, key: str) -> Path:
        return self.folder / name / key

    def _train(self, name: str, key: str) -> None:
        """Train, unless it is done; then make room for its figures."""
        place, method = self._place(name, key), METHODS[name]
        took = Training()
        if (twin := self._twin(name, key)) is not None:
            took = self.found.methods[name].runs[twin].training
        elif method.rule is None:
            if not on_main((place / "guide").is_dir):
                self.notice(f"training {name}, {key}")
                distill(self._config(name, key))
            told = on_main((place / "training.json").read_text)
            took = Training(**json.loads(told))
        if name not in self.found.methods:
            self.found.methods[name] = MethodResult(method.title, 0, 0.0, MethodCost(), {})
        self.found.methods[name].runs.setdefault(key, MethodRun(took, {}))
        self._save()

    def _config(self, name: str, key: str) -> DistillConfig:
        plan, place = self.plan, self._place(name, key)
        steps = on_main(partial(self._steps, name, key))
        shared: dict[str, Any] = {
            "output": str(place), "max_train_steps": steps, "resume": "latest",
            "train_batch_size": plan.train_batch_size, "mixed_precision": plan.mixed_precision,
            "gradient_checkpointing": plan.gradient_checkpointing,
            "lr_warmup_steps": max(1, min(100, steps // 8)), "validation_steps": steps,
            "checkpointing_steps": 50, "checkpoints_total_limit": 1, "report_to": "none",
            "seed": int(key.split("-")[1]), "pool": max(512, plan.train_batch_size),
            "replay_capacity": min(2048, 32 * plan.train_batch_size),
        }  # fmt: skip
        if METHODS[name].one_scale:
            w = plan.guidance_scale
            shared |= {"guidance_scale_min": w, "guidance_scale_max": w}
        return DistillConfig(**shared | dict(self.training) | dict(METHODS[name].settings))

    def _steps(self, name: str, key: str) -> int:
        """As many as the plan says, or as many as fit into the seconds that the default took."""
        budget, seed = key.split("-")
        started = self._place(name, key) / "config.json"
        if started.is_file():  # what was once decided stays
            return int(json.loads(started.read_text())["max_train_steps"])
        if budget == "samples":
            return self.plan.max_train_steps
        mine, default = (self.found.methods[m].runs[f"samples-{seed}"] for m in (name, DEFAULT))
        pace = mine.training.seconds / mine.training.steps
        return max(1, round(default.training.seconds / pace))

    def _twin(self, name: str, key: str) -> str | None:
        """The run for equal samples, where that for equal seconds has as many steps: the same
        guide would come of it. So it is with the default."""
        budget, _, seed = key.partition("-")
        if budget != "seconds":
            return None
        twin = f"samples-{seed}"
        steps = self.found.methods[name].runs[twin].training.steps
        return twin if on_main(partial(self._steps, name, key)) == steps else None

    # -- measuring ----------------------------------------------------------------------

    def _method(self, name: str, key: str) -> Attachable:
        rule = METHODS[name].rule
        return rule() if rule else Guide.from_pretrained(self._place(name, key) / "guide")

    def _measure(self, host: str) -> None:
        """What is missing of one host, saved after each method."""
        missing = [(n, k) for n, k in self._runs() if host not in self._scores(n, k)]
        if not missing and host in self.found.references:
            return
        self.notice(f"{host}: drawn without guidance and with CFG")
        bench = Bench(self.hosts[host], self.how, self.scorer)
        self.found.references[host] = {"none": bench.none.scores, "cfg": bench.cfg.scores}
        for name, key in missing:
            if (twin := self._twin(name, key)) is not None:
                self._scores(name, key)[host] = self._scores(name, twin)[host]
            else:
                self.notice(f"{host}: {name}, {key}")
                self._scores(name, key)[host] = bench.measure(self._method(name, key))
            self._save()

    def _scores(self, name: str, key: str) -> dict[str, HostScores]:
        return self.found.methods[name].runs[key].hosts

    # -- cost ---------------------------------------------------------------------------

    @torch.no_grad()
    def _time(self) -> None:
        """All methods take turns on the base, so that a busy machine strikes all alike."""
        self.notice("timing all methods side by side")
        self.found.methods.update(on_main(self._timed))
        self._save()

    def _planned(self) -> dict[str, MethodResult]:
        """What was found of the methods that are wanted; others may be left from before."""
        return {name: self.found.methods[name] for name in self.plan.methods}

    def _timed(self) -> dict[str, MethodResult]:
        timed = {}
        base = next(iter(self.hosts))
        pipe, steps = self.hosts[base].load(), self.plan.num_inference_steps
        denoiser = sum(p.numel() for p in pipe.unet.parameters())
        # runs of other seeds may be left from before, and not measured
        keys = {
            name: next(key for key, run in m.runs.items() if base in run.hosts)
            for name, m in self._planned().items()
        }
        methods = {name: self._method(name, key) for name, key in keys.items()}
        w = self.plan.guidance_scale
        turns = {"cfg": None, **methods}
        # of a prompt that says something: to the null prompt adaptive guidance agrees at once
        prompt = self.how.names[0]
        calls = {
            name: partial(timed_call, pipe, m, w, steps, BATCH, prompt) for name, m in turns.items()
        }
        rounds = take_turns(calls, self.plan.rounds)
        plain = denoiser_flops(pipe, partial(timed_call, pipe, None, 1.0, 1, 1))
        for name, method in methods.items():
            result = self.found.methods[name]
            passes = result.runs[keys[name]].hosts[base].passes
            parameters, flops = 0, passes / steps * plain
            if isinstance(method, Guide):
                parameters = sum(p.numel() for p in method.parameters())
                flops = denoiser_flops(pipe, partial(timed_call, pipe, method, w, 1, 1))
            timed[name] = MethodResult(
                result.title, parameters, parameters / denoiser,
                MethodCost(passes, flops / plain, speed_up(rounds, name)), result.runs,
            )  # fmt: skip
        return timed


def _content(value: Any) -> Any:
    """A file by the checksum of what it holds, anything else as it is."""
    named = isinstance(value, str) and Path(value).is_file()
    return f"{crc32(Path(value).read_bytes()):08x}" if named else value
