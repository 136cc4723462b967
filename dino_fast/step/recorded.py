"""A step that is recorded as a CUDA graph and replayed.

The host then launches one graph instead of some 1,650 kernels, which it cannot do as fast as a GPU runs them: on an
H200 with batches of 128 the launches took 83 ms and the kernels 65.
"""

import torch
from torch import Tensor

from dino_fast.step.hyper import DeviceHyper, Hyper
from dino_fast.step.train_step import StepOutput, TrainStep
from shards.errors import UserError

WARM_UP = 4  # steps before the recording, in which cuDNN chooses its algorithms and the state gets its memory


class RecordedStep:
    """Is called like `TrainStep`, on one GPU, with kernels, and with batches of one shape.

    The first steps run as they are. Then one is recorded; from there on its launches are replayed, with the batch and
    the hyper-parameters copied to the memory in which the recording found them.
    """

    def __init__(self, step: TrainStep) -> None:
        self._step, self._steps = step, 0
        self._graph = torch.cuda.CUDAGraph()
        self._side = torch.cuda.Stream()
        self._inputs: list[Tensor | None] = []
        self._output: StepOutput | None = None

    def __call__(
        self, globals_: Tensor, locals_: Tensor | None, hyper: Hyper, scales: Tensor | None = None
    ) -> StepOutput:
        """Make one update. The output belongs to the caller: no later step overwrites it."""
        self._steps += 1
        device_hyper: DeviceHyper = self._step.prepare(hyper)
        self._copy_inputs([globals_, locals_, scales, *device_hyper])
        if self._steps <= WARM_UP:
            return self._run_in_side_stream()
        if self._output is None:
            self._output = self._record()
        self._graph.replay()
        return StepOutput(*(figure.clone() for figure in self._output))

    def _copy_inputs(self, values: list[Tensor | None]) -> None:
        """Copy batch and hyper-parameters to where the step reads them from its first run on."""
        if not self._inputs:
            self._inputs = [None if value is None else value.clone() for value in values]
        for place, value in zip(self._inputs, values, strict=True):
            if place is not None and value is not None:
                place.copy_(value, non_blocking=True)

    def _record(self) -> StepOutput:
        """Record a step, and return where its output will be after each replay."""
        try:
            # The loader's threads go on allocating meanwhile, which must not end the recording.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                output = self._run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the step cannot be recorded here ({reason}). Pass --graph never.") from error
        self._step.update.after_recording()
        return output

    def _run(self) -> StepOutput:
        globals_, locals_, scales, values, teacher_temp = self._inputs
        assert globals_ is not None
        assert values is not None
        assert teacher_temp is not None
        return self._step.run(globals_, locals_, DeviceHyper(values, teacher_temp), scales)

    def _run_in_side_stream(self) -> StepOutput:
        """Run a step in another stream than the default one, as a recording requires."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            output = self._run()
        torch.cuda.current_stream().wait_stream(self._side)
        return output
