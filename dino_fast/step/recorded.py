"""A step recorded as a CUDA graph and replayed: the host launches one graph instead of some 1,800 kernels, which it
cannot do as fast as a GPU ends them. On an H200 with batches of 128 the launches took 83 ms, the kernels 65.
"""

import torch
from torch import Tensor

from dino_fast.run.schedules import Hyper
from dino_fast.step.train_step import StepOutput, TrainStep
from dino_fast.step.update import DeviceHyper, KernelUpdate
from shards.errors import UserError

WARM_UP = 4  # steps before the recording, in which graphs are compiled, ways are chosen, and state gets its memory


class GraphedStep:
    """Calls like `TrainStep`, on one GPU, with kernels, and batches of one shape.

    The first steps run as they are; then one is recorded, and from there on its launches are replayed with the batch
    and the settings copied to where it found them.
    """

    def __init__(self, step: TrainStep) -> None:
        self._step, self._steps = step, 0
        self._graph = torch.cuda.CUDAGraph()
        self._side = torch.cuda.Stream()
        self._inputs: list[Tensor] = []
        self._output: StepOutput | None = None

    def __call__(self, globals_: Tensor, locals_: Tensor | None, hyper: Hyper) -> StepOutput:
        """One update. The output is the caller's."""
        self._steps += 1
        settings: DeviceHyper = self._step.settings(hyper)
        self._bring([globals_, *([] if locals_ is None else [locals_]), *settings])
        if self._steps <= WARM_UP:
            return self._beside()
        if self._output is None:
            self._output = self._record()
        self._graph.replay()
        return StepOutput(*(figure.clone() for figure in self._output))

    def _bring(self, values: list[Tensor]) -> None:
        """Batch and settings to where the step reads them, from its first run on: kernels are compiled for places."""
        if not self._inputs:
            self._inputs = [value.clone() for value in values]
        for place, value in zip(self._inputs, values, strict=True):
            place.copy_(value)

    def _record(self) -> StepOutput:
        """Where the step's output will be after each replay."""
        try:
            # The loader's threads go on allocating meanwhile, which is none of the recording's business.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                output = self._run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the step cannot be recorded here ({reason}): pass --graph never") from error
        assert isinstance(self._step.update, KernelUpdate)
        self._step.update.recorded()
        return output

    def _run(self) -> StepOutput:
        *crops, values, teacher_temp = self._inputs
        return self._step.run(crops[0], crops[1] if len(crops) > 1 else None, DeviceHyper(values, teacher_temp))

    def _beside(self) -> StepOutput:
        """A step on a stream of its own, as recording asks for."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            output = self._run()
        torch.cuda.current_stream().wait_stream(self._side)
        return output
