"""How long something takes, on a GPU too, where a call returns before it is done."""

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], object], device: torch.device, seconds: float = 0.3) -> float:
    """
    Median seconds of a call, for about `seconds` in all. On a GPU eight calls are recorded as a CUDA graph and its
    replays are timed with events: the time the host takes to launch a call is not in it.
    """
    for _ in range(3):
        call()
    synchronize(device)
    if device.type == "cuda":
        calls, graph = 8, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        graph.replay()
    times: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times) < 5:
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000 / calls)
        else:
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
    return statistics.median(times)
