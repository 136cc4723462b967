"""What NVIDIA DALI makes of encoded images, asked in a process of its own: on some files it crashes."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

Answer = tuple[int, int] | str  # height and width; or its error


def ask(samples: Sequence[bytes], seconds: float = 300) -> list[Answer]:
    """DALI's answers, by the decoder and the arguments of pipelines/decode_dali.py, on the CPU.

    Raises TimeoutError where it hangs and BrokenProcessPool where it crashes.
    """
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
        return pool.submit(_answers, list(samples)).result(seconds)
    finally:
        for process in list(pool._processes.values()):
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _answers(samples: list[bytes]) -> list[Answer]:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    waiting = iter(samples)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        (encoded,) = fn.external_source(
            lambda: [[np.frombuffer(next(waiting), np.uint8)]], num_outputs=1, dtype=[types.UINT8], ndim=[1]
        )
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
        pipeline.set_outputs(image)
    pipeline.build()
    return [_answer(pipeline) for _ in samples]


def _answer(pipeline: Any) -> Answer:
    try:
        (images,) = pipeline.run()
        return tuple(np.asarray(images[0]).shape[:2])
    except RuntimeError as error:
        return str(error).partition("encountered:")[2].strip() or str(error)
