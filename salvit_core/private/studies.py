"""The private runs that notebooks share: which study each kind of run belongs to, and how it is measured once."""

from collections.abc import Sequence

from tqdm.auto import tqdm

from .. import records
from . import latency, sessions
from .evaluation import DriftRun, EvaluationRun, drift
from .evaluation import ensure as ensure_evaluation
from .latency import LatencyRun
from .sessions import SessionRun

Run = EvaluationRun | DriftRun | LatencyRun | SessionRun

STUDIES = {EvaluationRun: "encrypted", DriftRun: "drift", LatencyRun: "latency", SessionRun: "sessions"}


def ensure(run: Run, source: str = "local") -> dict:
    """The record of a run; measures what is not there yet."""
    if isinstance(run, EvaluationRun):
        return ensure_evaluation(run, source)
    measure = {DriftRun: drift, LatencyRun: latency.measure, SessionRun: sessions.measure}[type(run)]
    return records.ensure(STUDIES[type(run)], run, measure, source)


def there(runs: Sequence[Run], source: str = "local") -> dict[Run, dict]:
    """The records that exist, by run, in order; nothing is measured."""
    folder = records.folder(source)
    paths = {run: folder / STUDIES[type(run)] / f"{records.key(STUDIES[type(run)], run)}.json" for run in runs}
    return {run: ensure(run, source) for run, path in paths.items() if path.exists()}


def collect(runs: Sequence[Run], source: str = "local", label: str = "private inferences") -> dict[Run, dict]:
    """The records by run, in order: measured where they are missing ("local"), or those that exist ("reference")."""
    if source != "local":
        return there(runs, source)
    return {run: ensure(run) for run in tqdm(dict.fromkeys(runs), desc=label)}
