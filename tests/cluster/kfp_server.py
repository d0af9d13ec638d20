"""A double of the Kubeflow Pipelines server: its published REST API v2beta1 over lists in memory.

Requests and answers are compared with the published Swagger document (`kfp_api/`), unknown fields refused. It runs no
pod: tests say what becomes of a run. `conftest.py` gives it to this folder's tests.
"""

import functools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import jsonschema
import pytest
import yaml
from werkzeug.wrappers import Request, Response

from tests.cluster.faulty_server import FaultyServer, json_response
from tests.cluster.kfp_api.make import API

Record = dict[str, Any]
_PROXY = re.compile(r"^/+api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy/+")  # the way through Kubernetes
_KINDS = {
    "pipelines": ("pipeline_id", "v2beta1Pipeline"),
    "versions": ("pipeline_version_id", "v2beta1PipelineVersion"),
    "experiments": ("experiment_id", "v2beta1Experiment"),
    "runs": ("run_id", "v2beta1Run"),
    "recurringruns": ("recurring_run_id", "v2beta1RecurringRun"),
}


class ApiProblem(Exception):
    """An error that the server answers with."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class KfpServer(FaultyServer):
    """The double.

    Attributes:
        multi_user: requests have to name a namespace; else they must not.
        stored: kind -> its records in the order in which they were made.
    """

    def reset(self) -> None:
        super().reset()
        self.multi_user = False
        self.stored: dict[str, list[Record]] = {kind: [] for kind in _KINDS}
        self._clock = 0

    def run(self, name: str) -> Record:
        """The newest run of a name."""
        return [run for run in self.stored["runs"] if run["display_name"] == name][-1]

    def set_step(self, run: Record, step: str, state: str) -> None:
        """What a task of a run is doing now."""
        tasks = run.setdefault("run_details", {"task_details": []})["task_details"]
        task = next((task for task in tasks if task["display_name"] == step), None)
        if task is None:
            task = {"run_id": run["run_id"], "task_id": str(uuid.uuid4()), "display_name": step,
                    "create_time": self._now(), "start_time": self._now()}  # fmt: skip
            tasks.append(task)
        task["state"] = state
        if state in ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"):
            task["end_time"] = self._now()

    def end(self, run: Record, state: str) -> None:
        """The run ends."""
        run |= {"state": state, "finished_at": self._now()}

    def error(self, status: int, message: str) -> Response:
        return json_response({"code": 2, "message": message, "details": []}, status)

    def _handle(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["PATH_INFO"] = _PROXY.sub("/", environ["PATH_INFO"])
        return super()._handle(environ, start_response)

    def answer(self, request: Request) -> Response:
        operation, names = _operation(request)
        if operation is None:
            self.violations.append(f"{request.method} {request.path}: no such operation")
            return self.error(404, "Not Found")
        given = _given(request, names)
        self.violations += [f"{operation['operationId']}: {text}" for text in _refusals(operation, given)]
        try:
            content = getattr(self, f"_{operation['operationId'].rpartition('_')[2]}")(**given)
        except ApiProblem as problem:
            return self.error(problem.status, str(problem))
        schema = operation["responses"]["200"]["schema"]
        found = [f"{operation['operationId']} answered: {text}" for text in _problems(schema, content)]
        self.violations += found
        return json_response(content)

    def _GetHealthz(self) -> Record:
        return {"multi_user": self.multi_user, "pipeline_store": "database"}

    def _CreatePipeline(self, pipeline: Record) -> Record:
        self._check_namespace(pipeline.get("namespace"))
        if not pipeline.get("name"):
            raise ApiProblem(400, "pipeline's name is empty")
        if any(one["name"] == pipeline["name"] for one in self.stored["pipelines"]):
            raise ApiProblem(409, f"Failed to create a new pipeline. The name {pipeline['name']} already exist")
        return self._store("pipelines", pipeline)

    def _GetPipelineByName(self, name: str, namespace: str | None = None) -> Record:
        self._check_namespace(namespace)
        found = [one for one in self.stored["pipelines"] if one["name"] == name]
        if not found:
            raise ApiProblem(404, f"Pipeline {name} not found")
        return found[0]

    def _GetPipeline(self, pipeline_id: str) -> Record:
        return self._get("pipelines", pipeline_id)

    def _ListPipelines(self, namespace: str | None = None, **query: str) -> Record:
        self._check_namespace(namespace)
        return self._list("pipelines", "pipelines", query)

    def _DeletePipeline(self, pipeline_id: str, cascade: str = "false") -> Record:
        below = [one for one in self.stored["versions"] if one["pipeline_id"] == pipeline_id]
        if below and cascade != "true":
            raise ApiProblem(400, "the pipeline has versions; delete them first, or use cascade")
        for version in below:
            self.stored["versions"].remove(version)
        return self._delete("pipelines", pipeline_id)

    def _UploadPipeline(self, uploadfile: str, name: str = "", namespace: str | None = None, **more: str) -> Record:
        pipeline = self._CreatePipeline({"name": name, "display_name": name, "namespace": namespace or ""})
        self._UploadPipelineVersion(uploadfile, name=name, pipelineid=pipeline["pipeline_id"])
        return pipeline

    def _UploadPipelineVersion(
        self, uploadfile: str, pipelineid: str = "", name: str = "", display_name: str = "", description: str = ""
    ) -> Record:
        self._get("pipelines", pipelineid)
        documents = list(yaml.load_all(uploadfile, Loader=yaml.CSafeLoader))
        if "root" not in documents[0]:
            raise ApiProblem(400, "the file is no pipeline spec")
        below = [one for one in self.stored["versions"] if one["pipeline_id"] == pipelineid]
        if any(one["name"] == name for one in below):
            raise ApiProblem(409, f"Failed to create a new pipeline version. The name {name} already exist")
        spec = {"pipeline_spec": documents[0]}
        if len(documents) > 1:
            spec["platform_spec"] = documents[1]
        version = {"pipeline_id": pipelineid, "name": name, "display_name": display_name or name}
        return self._store("versions", version | {"description": description, "pipeline_spec": spec})

    def _ListPipelineVersions(self, pipeline_id: str, **query: str) -> Record:
        return self._list("versions", "pipeline_versions", query, lambda one: one["pipeline_id"] == pipeline_id)

    def _GetPipelineVersion(self, pipeline_id: str, pipeline_version_id: str) -> Record:
        return self._get("versions", pipeline_version_id)

    def _DeletePipelineVersion(self, pipeline_id: str, pipeline_version_id: str) -> Record:
        return self._delete("versions", pipeline_version_id)

    def _CreateExperiment(self, experiment: Record) -> Record:
        self._check_namespace(experiment.get("namespace"))
        if any(one["display_name"] == experiment["display_name"] for one in self.stored["experiments"]):
            raise ApiProblem(409, "experiment already exists")
        return self._store("experiments", experiment)

    def _ListExperiments(self, namespace: str | None = None, **query: str) -> Record:
        self._check_namespace(namespace)
        return self._list("experiments", "experiments", query)

    def _DeleteExperiment(self, experiment_id: str) -> Record:
        return self._delete("experiments", experiment_id)

    def _CreateRun(self, run: Record) -> Record:
        self._check_parameters(run)
        return self._store("runs", run | {"state": "PENDING", "storage_state": "AVAILABLE"})

    def _GetRun(self, run_id: str) -> Record:
        return self._get("runs", run_id)

    def _ListRuns(self, namespace: str | None = None, **query: str) -> Record:
        if "experiment_id" not in query:
            self._check_namespace(namespace)
        return self._list("runs", "runs", query)

    def _DeleteRun(self, run_id: str) -> Record:
        return self._delete("runs", run_id)

    def _TerminateRun(self, run_id: str) -> Record:
        self._get("runs", run_id)["state"] = "CANCELING"
        return {}

    def _ArchiveRun(self, run_id: str) -> Record:
        self._get("runs", run_id)["storage_state"] = "ARCHIVED"
        return {}

    def _CreateRecurringRun(self, recurring_run: Record) -> Record:
        self._check_parameters(recurring_run)
        status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}.get(recurring_run.get("mode", ""), "STATUS_UNSPECIFIED")
        return self._store("recurringruns", recurring_run | {"status": status})

    def _GetRecurringRun(self, recurring_run_id: str) -> Record:
        return self._get("recurringruns", recurring_run_id)

    def _ListRecurringRuns(self, namespace: str | None = None, **query: str) -> Record:
        if "experiment_id" not in query:
            self._check_namespace(namespace)
        return self._list("recurringruns", "recurringRuns", query)

    def _DeleteRecurringRun(self, recurring_run_id: str, propagation_policy: str = "") -> Record:
        if propagation_policy != "ORPHAN":  # Kubernetes removes the Workflows that the schedule owns
            for run in self.stored["runs"]:
                if run.get("recurring_run_id") == recurring_run_id and run["state"] in ("PENDING", "RUNNING"):
                    self.end(run, "FAILED")
        return self._delete("recurringruns", recurring_run_id)

    def _EnableRecurringRun(self, recurring_run_id: str) -> Record:
        self._get("recurringruns", recurring_run_id)["status"] = "ENABLED"
        return {}

    def _DisableRecurringRun(self, recurring_run_id: str) -> Record:
        self._get("recurringruns", recurring_run_id)["status"] = "DISABLED"
        return {}

    def _check_namespace(self, namespace: str | None) -> None:
        if self.multi_user != bool(namespace):
            raise ApiProblem(400, f"Namespace {'is required' if self.multi_user else 'must be empty'}")

    def _check_parameters(self, run: Record) -> None:
        """As the server does: the version exists, and takes the parameters."""
        reference = run.get("pipeline_version_reference") or {}
        versions = [one for one in self.stored["versions"] if one["pipeline_id"] == reference.get("pipeline_id")]
        if wanted := reference.get("pipeline_version_id"):
            versions = [one for one in versions if one["pipeline_version_id"] == wanted]
        if not versions:
            raise ApiProblem(404, "PipelineVersion not found")
        known = versions[-1]["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        given = (run.get("runtime_config") or {}).get("parameters") or {}
        if unknown := set(given) - set(known):
            raise ApiProblem(400, f"parameters {sorted(unknown)} are not in the pipeline")

    def _store(self, kind: str, record: Record) -> Record:
        stored = {**record, _KINDS[kind][0]: str(uuid.uuid4()), "created_at": self._now()}
        self.stored[kind].append(stored)
        return stored

    def _get(self, kind: str, identity: str) -> Record:
        for record in self.stored[kind]:
            if record[_KINDS[kind][0]] == identity:
                return record
        raise ApiProblem(404, f"{kind} {identity} not found")

    def _delete(self, kind: str, identity: str) -> Record:
        self.stored[kind].remove(self._get(kind, identity))
        return {}

    def _list(self, kind: str, key: str, query: Record, among: Callable[[Record], bool] = lambda one: True) -> Record:
        predicates = json.loads(query.get("filter") or "{}").get("predicates", [])
        self.violations += _problems({"$ref": "#/definitions/v2beta1Filter"}, {"predicates": predicates})
        found = [one for one in self.stored[kind] if among(one)]
        for predicate in predicates:
            found = [one for one in found if one.get(predicate["key"]) == predicate["string_value"]]
        if query.get("experiment_id"):
            found = [one for one in found if one.get("experiment_id") == query["experiment_id"]]
        if query.get("sort_by", "").endswith(" desc"):
            found = sorted(found, key=lambda one: one[query["sort_by"].split()[0]], reverse=True)
        start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 10)
        answer: Record = {key: found[start : start + size], "total_size": len(found)}
        return answer | ({"next_page_token": str(start + size)} if start + size < len(found) else {})

    def _now(self) -> str:
        self._clock += 1  # no two moments alike, so that the newest is one
        return datetime.now(UTC).strftime(f"%Y-%m-%dT%H:%M:%S.{self._clock:06d}Z")


@functools.cache
def _api() -> Record:
    return json.loads(API.read_text())


@functools.cache
def _paths() -> list[tuple[re.Pattern[str], list[str], Record]]:
    """Every path of the API as a pattern, those without a name in braces first."""
    found = []
    for path, verbs in sorted(_api()["paths"].items(), key=lambda item: item[0].count("{")):
        names = re.findall(r"\{([^}]+)\}", path)
        pattern = re.sub(r"\\\{[^}]+\\\}", "([^/:]+)", re.escape(path))
        found.append((re.compile(pattern), names, verbs))
    return found


def _operation(request: Request) -> tuple[Record | None, dict[str, str]]:
    for pattern, names, verbs in _paths():
        match = pattern.fullmatch(request.path)
        if match and request.method.lower() in verbs:
            return verbs[request.method.lower()], dict(zip(names, match.groups(), strict=True))
    return None, {}


def _given(request: Request, names: dict[str, str]) -> Record:
    """The operation's parameters, as Python's arguments."""
    given: Record = {**names, **request.args.to_dict()}
    for name, file in request.files.items():
        given[name] = file.read().decode()
    if request.is_json and request.get_data():
        given["body"] = request.get_json()
        operation, _ = _operation(request)
        for parameter in (operation or {}).get("parameters", []):
            if parameter["in"] == "body":
                given[parameter["name"]] = given.pop("body")
    return given


def _refusals(operation: Record, given: Record) -> Iterator[str]:
    parameters = {parameter["name"]: parameter for parameter in operation.get("parameters", [])}
    yield from (f"unknown parameter {name}" for name in given if name not in parameters)
    for name, parameter in parameters.items():
        if parameter.get("required") and name not in given:
            yield f"parameter {name} is missing"
        if parameter["in"] == "body" and name in given:
            yield from _problems(parameter["schema"], given[name])


def _problems(schema: Record, content: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator({**schema, "definitions": _closed_definitions()})
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(content)]


@functools.cache
def _closed_definitions() -> Record:
    """The API's definitions, with fields that they do not name refused; what stands beside a reference is dropped."""

    def closed(schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return {"$ref": schema["$ref"]}
        result = {key: closed(value) for key, value in schema.items() if key != "properties"}
        if "properties" in schema:
            result["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
            result.setdefault("additionalProperties", False)
        return result

    return {name: closed(schema) for name, schema in _api()["definitions"].items()}


@functools.cache
def _server() -> KfpServer:
    return KfpServer()


@pytest.fixture
def kfp_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A running double, empty, named by kfp's own variable; what it was asked has to follow the published API."""
    server = _server()
    server.reset()
    for name in ("TUNELOOP_KFP_TOKEN", "TUNELOOP_KFP_TOKEN_FILE", "TUNELOOP_KFP_COOKIES", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
    yield server
    assert server.violations == []
