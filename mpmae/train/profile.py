"""A window of steps under torch's profiler: per rank a trace for ui.perfetto.dev or chrome://tracing and a table."""

import logging
from contextlib import AbstractContextManager, suppress

import torch
from rich.console import Console
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from mpmae.config import RunConfig
from mpmae.engine import World
from mpmae.files import TEMP_SUFFIX, write_whole

FOLDER = "profile"
_ROWS = 30
_NAME_WIDTH = 60
_LOG = logging.getLogger(__name__)


class StepProfile(AbstractContextManager):
    """Traces the steps `log.profile_steps`; entered around the loop, told of each step that is done.

    Each rank writes RUN/profile/rank-N.json.gz and rank-N.txt; a rank that cannot warns, and the run goes on. If there is a
    step before the first, it is traced and thrown away: starting a trace takes time that belongs to no step.
    """

    def __init__(self, config: RunConfig, world: World, start_step: int, console: Console):
        self._folder, self._rank, self._console = config.run.dir / FOLDER, world.rank, console
        self._start_step, self._profiler, self._is_on_gpu = start_step, None, world.device.type == "cuda"
        if config.log.profile_steps is None:
            return
        self._first, self._last = config.log.profile_steps
        if self._last <= start_step:
            console.print(
                f"[yellow]note:[/yellow] no profile: step {start_step} is done, asked for {self._first}-{self._last}"
            )
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_on_gpu else [])]
        self._profiler = profile(
            activities=activities, schedule=self._action, profile_memory=True, on_trace_ready=self._write
        )

    def __enter__(self) -> "StepProfile":
        if self._profiler:
            self._profiler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def step_done(self) -> bool:
        """Once after every optimizer step; whether the files were written now, which takes its time."""
        if self._profiler is None:
            return False
        self._profiler.step()
        if self._start_step + self._profiler.step_num < self._last:
            return False
        self._stop()
        return True

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler:
            profiler.stop()

    def _action(self, index: int) -> ProfilerAction:
        """What to do in a step of this launch, from 0 on."""
        step = self._start_step + 1 + index
        if step == self._last:
            return ProfilerAction.RECORD_AND_SAVE
        if self._first <= step < self._last:
            return ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == self._first - 1 else ProfilerAction.NONE

    def _write(self, profiler: profile) -> None:
        trace = self._folder / f"rank-{self._rank}.json.gz"
        aside = trace.with_name(f"rank-{self._rank}{TEMP_SUFFIX}.json.gz")  # the ending makes it a compressed one
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(aside))
            aside.replace(trace)
            write_whole(trace.with_suffix("").with_suffix(".txt"), self._tables(profiler))
        except (OSError, RuntimeError) as error:
            _LOG.warning("rank %d: the profile is not written to %s: %s", self._rank, self._folder, error)
        else:
            self._console.print(f"profile of steps {self._first}-{self._last}: {self._folder}/rank-*.json.gz (and .txt)")
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    def _tables(self, profiler: profile) -> str:
        """The operators that take most time, and those that allocate most memory."""
        device = "cuda" if self._is_on_gpu else "cpu"
        averages = profiler.key_averages()
        options = {"row_limit": _ROWS, "max_name_column_width": _NAME_WIDTH}
        parts = [
            f"rank {self._rank}, steps {self._first}-{self._last}",
            f"by time of their own ({device})",
            averages.table(sort_by=f"self_{device}_time_total", **options),
            f"by memory of their own ({device})",
            averages.table(sort_by=f"self_{device}_memory_usage", **options),
        ]
        if self._is_on_gpu:
            parts.append(torch.cuda.memory_summary())
        return "\n\n".join(parts) + "\n"
