"""The evaluation tasks. A new task is a file in this folder and an entry in `TASKS`."""

from koclip.evaluation.forgetting import specs_of
from koclip.evaluation.results import Spec, Task
from koclip.evaluation.tasks import multiple_choice, no_match, probe, ratings, retrieval, zero_shot

# Their numbers are shown in this order.
TASKS: tuple[Task, ...] = (
    retrieval.RETRIEVAL,
    zero_shot.ZERO_SHOT,
    retrieval.LANGUAGES,
    no_match.TASK,
    probe.LINEAR_PROBE,
    ratings.TASK,
    zero_shot.SHIFT,
    probe.FEW_SHOT,
    retrieval.STRESS,
    multiple_choice.TASK,
)
_SPECS = tuple(spec for task in TASKS for spec in task.specs)
SPECS: tuple[Spec, ...] = (*_SPECS, *specs_of(_SPECS))
