"""What a coordinator wants of a device, as requests that the owner's policy judges."""

from dataclasses import replace

from proxymoe.client.policy import Request, Usage
from proxymoe.common.assignment import Assignment
from proxymoe.common.messages import TrainTask
from proxymoe.common.privacy_settings import Noise
from proxymoe.common.round_keys import HYBRID, Offer, best_suite


def job_request(assignment: Assignment, coordinator: str, peak_bytes: int, used: Usage) -> Request:
    """What any job of an assignment asks: who cannot allow that says so before there is one."""
    request = Request(
        coordinator=coordinator,
        memory_bytes=max(assignment.memory_bytes, peak_bytes),
        rank=assignment.adapter.rank,
        steps=assignment.train.steps,
        cohort_size=assignment.cohort_size,
        clip_norm=assignment.clip_norm,
        masked=assignment.masked,
        hybrid=True,  # as far as anybody knows: round keys come with tasks
    )
    return _with_noise(request, assignment.noise, used)


def task_request(request: Request, task: TrainTask, offer: Offer | None, used: Usage) -> Request:
    """The request of a job, as this task has it; its answer is sealed to the offer, if any."""
    asked = replace(
        request,
        network_bytes=2 * request.network_bytes,  # it came, and an update is as long
        steps=task.train.steps,
        clip_norm=task.clip_norm,
        masked=task.masked,
        hybrid=offer is not None and best_suite(offer) == HYBRID,
    )
    return _with_noise(asked, task.noise, used)


def _with_noise(request: Request, noise: Noise | None, used: Usage) -> Request:
    if noise is None:
        nothing = Request(coordinator=request.coordinator)
        return replace(request, epsilon=nothing.epsilon, delta=nothing.delta)
    return replace(request, epsilon=noise.cost(used.exposure), delta=noise.delta)
