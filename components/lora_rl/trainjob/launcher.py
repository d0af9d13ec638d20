"""lora_rl by a TrainJob: created or found again, followed until it ends, removed.

A job belongs to an output, not to the pod that created it: it has no owner reference. When that pod is lost, the job
goes on, and the next attempt of the step finds it by its name and follows it. When the step ends by itself, whatever
the reason, it removes the job.
"""

import contextlib
import sys
import time
from collections.abc import Mapping

from components.config import RunConfig
from components.lora_rl.trainjob.api import TrainJobApi
from components.lora_rl.trainjob.manifest import REQUEST, Object, train_job
from components.lora_rl.trainjob.pods import Ending, Pods
from tuneloop.errors import EXIT_OK, EXIT_TRY_AGAIN, EXIT_USER_ERROR, TryAgain, TuneloopError, UserError
from tuneloop.storage import is_remote

WATCH_SECONDS = 20.0  # after which the clocks and the pods are looked at, whatever the watch says
GONE_SECONDS = 600.0  # for an earlier job to be removed, its pods' grace included
STOP_SECONDS = 150.0  # for the job to stop with the step: more than the pods' grace
MADE_SECONDS = 10.0  # for a request to create the job to be carried out, when nobody waited for its answer
LOG_SECONDS = 10.0  # for the last lines of an ended job
_GONE_POLL_SECONDS = 1.0
_SIGTERM = 143  # a shell's exit code of a process ended by it


class NodeFailed(TuneloopError):
    """A node ended by a bug or was killed; its log says more."""


def launch(config: RunConfig, inputs: Mapping[str, str], output: str, fingerprint: str) -> None:
    """Have a TrainJob make `output`.

    Raises:
        UserError: something is not in an object store, or the training found the user's mistake.
        TryAgain: told to stop, queued for too long, preempted, or the API server is away.
        NodeFailed: the training failed.
    """
    for name, uri in {**inputs, "output": output}.items():
        if not is_remote(uri):
            raise UserError(f'--{name} {uri}: the nodes of a TrainJob have disks of their own; give an s3:// URI, or '
                            'set lora_rl.distributed.launcher = "inline"')  # fmt: skip
    api = TrainJobApi(config.cluster.namespace, config.lora_rl.distributed.trainjob.patience_seconds)
    _Launch(api, config, train_job(config, inputs, output, fingerprint)).run()


class _Launch:
    def __init__(self, api: TrainJobApi, config: RunConfig, wanted: Object):
        self._api, self._wanted, self._settings = api, wanted, config.lora_rl.distributed.trainjob
        self._name, self._queue = wanted["metadata"]["name"], config.cluster.queue
        self._job: Object = wanted
        self._pods = Pods(api, self._name, self._settings.nodes)
        self._state, self._said = "", set[str]()
        self._waits_since: float | None = time.monotonic()
        self._creating = False

    def run(self) -> None:
        """Create or adopt the job, follow it, and remove it."""
        try:
            try:
                self._claim()
            except TryAgain:
                self._await_made()
                raise
            with self._pods:
                try:
                    self._follow()
                except TryAgain:
                    self._stop()
                    raise
                finally:
                    self._pods.close(LOG_SECONDS)
        finally:
            self._remove()

    def _claim(self) -> None:
        """Make `_job` the one that is wanted; an ended one, or one that makes something else, is removed first.

        Raises:
            UserError: the job of this name is not ours.
        """
        deadline = time.monotonic() + GONE_SECONDS
        while True:
            self._creating = True
            job, made = self._api.ensure(self._wanted)
            self._creating = False
            if not _request(job):
                raise UserError(
                    f"TrainJob {self._name} was not made by tuneloop; remove it, or choose another --output"
                )
            if _request(job) == _request(self._wanted):
                going = "deletionTimestamp" not in job["metadata"] and (made or not _ended(job))
                if going:
                    self._say(f"TrainJob {self._name} {'created' if made else 'is under way already; following it'}")
                    self._job = job
                    return
            if "deletionTimestamp" not in job["metadata"]:
                self._say(f"TrainJob {self._name} of an earlier attempt is removed")
                self._api.delete(job)
            self._await_gone(job, deadline)

    def _await_made(self) -> None:
        """Wait for a job whose creation was asked for and not answered, so that it can be removed."""
        deadline = time.monotonic() + MADE_SECONDS
        with contextlib.suppress(TuneloopError):  # `_remove` says so
            while self._creating and time.monotonic() < deadline and not self._api.find(self._name, briefly=True):
                time.sleep(_GONE_POLL_SECONDS)

    def _await_gone(self, job: Object, deadline: float, *, briefly: bool = False) -> None:
        """Wait until there is no such job.

        Raises:
            TryAgain: it stays.
        """
        uid = job["metadata"]["uid"]
        while (found := self._api.find(self._name, briefly=briefly)) and found["metadata"]["uid"] == uid:
            if time.monotonic() > deadline:
                raise TryAgain(f"TrainJob {self._name} of an earlier attempt is still being removed; look at its pods")
            time.sleep(_GONE_POLL_SECONDS)

    def _follow(self) -> None:
        """Look at every change of the job until it is complete."""
        while True:
            job = self._api.find(self._name)
            if job is None or job["metadata"]["uid"] != self._job["metadata"]["uid"]:
                raise TryAgain(f"TrainJob {self._name} was removed by somebody else; the same command continues it")
            if self._is_complete(job):
                return
            for changed in self._api.watch(self._name, job["metadata"]["resourceVersion"], self._patience()):
                if changed["deleted"]:
                    break
                if self._is_complete(changed):
                    return

    def _is_complete(self, job: Object) -> bool:
        """Whether the job is; raises for what has gone wrong, and for what takes too long."""
        if _is(job, "Failed"):
            self._pods.look()
            raise self._why_failed(_message(job, "Failed"))
        if _is(job, "Complete"):
            self._say(f"TrainJob {self._name} is complete")
            return True
        for ending in list(self._pods.endings.values()):
            if ending.exit_code == EXIT_USER_ERROR:  # to start the nodes again would not help
                raise UserError(ending.message or f"node {ending.node} of TrainJob {self._name} refused; see its log")
        self._look_at_the_clock(job)
        return False

    def _look_at_the_clock(self, job: Object) -> None:
        is_queued = bool(job["spec"].get("suspend"))
        if self._pods.running and not is_queued:
            self._enter("running")
            self._say(f"TrainJob {self._name} runs on {self._settings.nodes} nodes")
            self._waits_since = None
            return
        self._waits_since = self._waits_since or time.monotonic()
        where = f"in queue {self._queue!r}" if is_queued else "for its pods to start"
        reason = _message(job, "Suspended") if is_queued else self._pods.waiting
        self._enter(where)
        text = f"TrainJob {self._name} waits {where}"
        # Kubernetes words one reason in ever new ways: it is said once
        self._say(f"{text} ({reason})" if reason else text, reason.partition(":")[0] or text)
        limit = self._settings.queue_timeout_seconds
        if time.monotonic() - self._waits_since > limit:
            raise TryAgain(f"TrainJob {self._name} has waited {where} for {limit} s ({reason or 'no reason given'}); "
                           "give it again later, "
                           "ask for less, or raise lora_rl.distributed.trainjob.queue_timeout_seconds")  # fmt: skip

    def _patience(self) -> float:
        """Seconds until the clock has to be looked at."""
        if self._waits_since is None:
            return WATCH_SECONDS
        left = self._waits_since + self._settings.queue_timeout_seconds - time.monotonic()
        return min(WATCH_SECONDS / 4, max(1.0, left))

    def _why_failed(self, message: str) -> TuneloopError:
        """What a failed job means, by how its nodes ended: the user's mistake, a bug, or bad luck."""
        again = "the same command continues from its last checkpoint"
        for is_it in (_is_mistake, _is_lost, _is_bug):  # nodes that have lost another one end as by a bug
            for ending in filter(is_it, self._pods.last_endings()):
                said = ending.message or ending.reason or "its log says why"
                node = f"node {ending.node} of TrainJob {self._name}"
                if is_it is _is_mistake:
                    return UserError(said)
                if is_it is _is_lost:
                    return TryAgain(f"{node} was lost ({ending.reason}: {said}); {again}")
                return NodeFailed(f"{node} ended with exit code {ending.exit_code}: {said}")
        return TryAgain(f"TrainJob {self._name} failed ({message}); {again}")

    def _stop(self) -> None:
        """Have the nodes save what they have, and show what they say of it; a second request to stop ends the wait."""
        self._say(f"TrainJob {self._name} is stopped")
        try:
            self._api.delete(self._job, briefly=True)
            self._await_gone(self._job, time.monotonic() + STOP_SECONDS, briefly=True)
        except TuneloopError as error:
            print(f"warning: TrainJob {self._name} may go on: {error}", file=sys.stderr, flush=True)

    def _remove(self) -> None:
        try:
            job = self._job if "uid" in self._job["metadata"] else self._api.find(self._name, briefly=True)
            if job and _request(job) == _request(self._wanted):  # else it has not come to be
                self._api.delete(job, briefly=True)
        except TuneloopError as error:
            print(f"warning: TrainJob {self._name} is left over: {error}", file=sys.stderr, flush=True)

    def _enter(self, state: str) -> None:
        if state != self._state:
            self._said.clear()
        self._state = state

    def _say(self, text: str, topic: str = "") -> None:
        """Print a line, once in this state for each topic."""
        if (topic or text) not in self._said:
            sys.stdout.write(f"lora_rl: {text}\n")  # in one piece: logs are printed meanwhile
            sys.stdout.flush()
        self._said.add(topic or text)


def _request(job: Object) -> str:
    return job["metadata"].get("annotations", {}).get(REQUEST, "")


def _condition(job: Object, kind: str) -> Object:
    conditions = job.get("status", {}).get("conditions", [])
    return next((found for found in conditions if found["type"] == kind), {})


def _is(job: Object, kind: str) -> bool:
    return _condition(job, kind).get("status") == "True"


def _ended(job: Object) -> bool:
    return _is(job, "Complete") or _is(job, "Failed")


def _message(job: Object, kind: str) -> str:
    found = _condition(job, kind)
    return ": ".join(filter(None, (found.get("reason", ""), found.get("message", ""))))


def _is_mistake(ending: Ending) -> bool:
    return ending.exit_code == EXIT_USER_ERROR


def _is_lost(ending: Ending) -> bool:
    return ending.lost


def _is_bug(ending: Ending) -> bool:
    return ending.exit_code not in (EXIT_OK, EXIT_TRY_AGAIN, EXIT_USER_ERROR, _SIGTERM)
