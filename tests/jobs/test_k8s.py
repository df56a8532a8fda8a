"""The Kubernetes manifests: every document against its schema, and against what Rushes and Ray really do.

RayCluster and RayJob: the published KubeRay CRDs, unknown fields refused. They are not in this repository: put
`ray.io_rayclusters.yaml` and `ray.io_rayjobs.yaml` into ../shared/kuberay or a folder named by RUSHES_KUBERAY_CRDS.
The rest: kubernetes-validate. Overlays are rendered by `kubectl kustomize`, or where there is no kubectl by `resolve`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.tools.preflight import check_prompts, check_rewards, check_samplers

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
JOBS = ["overlays/kind-cpu", "overlays/one-gpu", "overlays/multi-gpu-spot"]
ALL = ["base", *JOBS, "overlays/shared-cluster"]
CRDS = Path(os.environ.get("RUSHES_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay"))
DOWNLOAD = (
    "no KubeRay CRDs: for f in rayclusters rayjobs; do curl -fLO "
    "https://raw.githubusercontent.com/ray-project/kuberay/v1.6.2/ray-operator/config/crd/bases/ray.io_$f.yaml; done; "
    "then set RUSHES_KUBERAY_CRDS to that folder"
)
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


# ---------------------------------------------------------------------------------------------- rendering


def patched(doc: dict, operations: list[dict]) -> dict:
    """RFC 6902 add, replace and remove: all that the overlays use."""
    doc = json.loads(json.dumps(doc))  # what YAML anchors share must not be patched together
    for operation in operations:
        *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:])
        at = doc
        for part in parents:
            at = at[int(part)] if isinstance(at, list) else at[part]
        key = (len(at) if last == "-" else int(last)) if isinstance(at, list) else last
        if operation["op"] == "remove":
            del at[key]
        elif operation["op"] == "add" and isinstance(at, list):
            at.insert(key, copy.deepcopy(operation["value"]))
        else:
            at[key] = copy.deepcopy(operation["value"])
    return doc


def resolve(folder: Path) -> list[dict]:
    """Resources and JSON patches of a kustomization; names of images and what components generate are left out."""
    plan = yaml.load((folder / "kustomization.yaml").read_text(), Loader)
    docs = []
    for name in [*plan.get("resources", ()), *plan.get("components", ())]:
        path = folder / name
        docs += resolve(path) if path.is_dir() else [d for d in yaml.load_all(path.read_text(), Loader) if d]
    for patch in plan.get("patches", ()):
        operations = yaml.load((folder / patch["path"]).read_text(), Loader)
        chosen = [d for d in docs if all(_field(d, key) == value for key, value in patch["target"].items())]
        assert chosen, f"{folder}: {patch} matches nothing"
        docs = [patched(d, operations) if d in chosen else d for d in docs]
    return docs


def _field(doc: dict, key: str) -> str:
    return doc["kind"] if key == "kind" else doc["metadata"][key]


@functools.cache
def rendered(name: str) -> str:
    """JSON of the list of documents (a string, so that no test changes another's)."""
    if shutil.which("kubectl"):
        done = subprocess.run(["kubectl", "kustomize", str(K8S / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.dumps(list(yaml.load_all(done.stdout, Loader)))
    if name == "overlays/shared-cluster":
        pytest.skip("its replacements need kubectl")
    return json.dumps(resolve(K8S / name))


def documents(name: str, kind: str | None = None) -> list[dict]:
    return [doc for doc in json.loads(rendered(name)) if kind in (None, doc["kind"])]


def cluster_spec(name: str) -> dict:
    """The Ray cluster of an overlay, whether of a job or on its own."""
    jobs = documents(name, "RayJob")
    return jobs[0]["spec"]["rayClusterSpec"] if jobs else documents(name, "RayCluster")[0]["spec"]


def templates(name: str) -> list[dict]:
    """All pod templates: head, workers, submitter."""
    spec = cluster_spec(name)
    found = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return found + [job["spec"]["submitterPodTemplate"] for job in documents(name, "RayJob")]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="compares with kubectl")
@pytest.mark.parametrize("name", ["base", *JOBS])
def test_the_fallback_renders_what_kubectl_does(name):
    ours = next(doc for doc in resolve(K8S / name) if doc["kind"] == "RayJob")
    theirs = documents(name, "RayJob")[0]
    text = re.sub(r'"rushes:[^"]+"', '"rushes"', json.dumps(theirs, sort_keys=True))
    ours["metadata"]["namespace"] = "rushes"
    assert json.loads(text) == json.loads(json.dumps(ours))


# ---------------------------------------------------------------------------------------------- schemas


@functools.cache
def crd(kind: str):
    """Validator of a KubeRay kind that refuses unknown fields, as the API server does with --validate=strict."""
    import jsonschema

    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(DOWNLOAD)
    versions = yaml.load(path.read_text(), Loader)["spec"]["versions"]
    schema = next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    _close(schema)
    return jsonschema.Draft202012Validator(schema)


def _close(schema: dict) -> None:
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for child in [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]:
        if isinstance(child, dict):
            _close(child)


def problems(doc: dict) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in crd(doc["kind"]).iter_errors(doc)]


def check_core(doc: dict) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(doc, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ALL)
def test_every_document_is_valid(name):
    for doc in documents(name):
        if doc["kind"] in ("RayJob", "RayCluster"):
            assert problems(doc) == []
        elif doc["apiVersion"] == "monitoring.coreos.com/v1":
            assert doc["kind"] in ("PodMonitor", "PrometheusRule") and doc["spec"]
        else:
            check_core(doc)
    for template in templates(name):  # the CRD's copy of the pod schema is looser than the real one
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}, **template}
        check_core({**pod, "metadata": {"name": "x", **template["metadata"]}})


@pytest.mark.parametrize(("name", "kind"), [("overlays/kind-cpu", "RayJob"), ("overlays/shared-cluster", "RayCluster")])
@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("workerGroupSpecs", 0, "maxReplica"), 3),
        (("workerGroupSpecs", 0, "maxReplicas"), "three"),
        (("headGroupSpec", "template", "spec", "containers", 0, "resource"), {}),
        (("autoscalerOptions", "version"), "v3"),
        (("authOptions", "mode"), "password"),
    ],
)
def test_a_wrong_field_fails(name, kind, where, value):
    doc = documents(name, kind)[0]
    at = doc["spec"] if kind == "RayCluster" else doc["spec"]["rayClusterSpec"]
    for part in where[:-1]:
        at = at[part]
    at[where[-1]] = value
    found = problems(doc)
    assert found and any(str(where[-1]) in line for line in found)


def test_a_wrong_field_of_a_core_object_fails():
    import kubernetes_validate

    policy = documents("base", "NetworkPolicy")[0]
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    with pytest.raises(kubernetes_validate.ValidationError):
        check_core(policy)
    job = documents("base", "RayJob")[0]
    job["spec"]["backofLimit"] = job["spec"].pop("backoffLimit")
    assert problems(job)


# ---------------------------------------------------------------------------------------------- rules of KubeRay


@pytest.mark.parametrize("name", ALL)
def test_what_the_operator_would_refuse(name):
    """Checks that KubeRay makes beyond the schema (its utils/validation.go)."""
    spec = cluster_spec(name)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert "resources" not in group  # never together with those of rayStartParams
        assert group["template"]["spec"]["restartPolicy"] == "Never"  # autoscaler v2
        assert "labels" not in group["rayStartParams"]
    for job in documents(name, "RayJob"):
        rules = job["spec"].get("deletionStrategy", {}).get("deletionRules", [])
        assert not (rules and job["spec"].get("shutdownAfterJobFinishes"))
        assert rules or job["spec"]["shutdownAfterJobFinishes"]
        for status in ("SUCCEEDED", "FAILED"):
            ttl = {r["policy"]: r["condition"]["ttlSeconds"] for r in rules if r["condition"]["jobStatus"] == status}
            assert not rules or ttl["DeleteCluster"] <= ttl["DeleteSelf"]
        # in K8sJobMode the entrypoint is pasted into the submitter's shell script
        assert not re.search(r"[;&|$`<>\\\"']", job["spec"]["entrypoint"])


@pytest.mark.parametrize("name", ALL)
def test_ray_reads_the_resources_that_are_meant(name):
    """Through the very function by which Ray's autoscaler reads a RayCluster."""
    nodes = node_types(name)
    head = nodes.pop("headgroup")["resources"]
    assert head["CPU"] == 0 and "rushes_controller" in head
    marked = {mark for node in nodes.values() for mark in node["resources"] if mark.startswith("rushes_")}
    assert marked == {"rushes_rollout", "rushes_reward", "rushes_learner"}
    for node in nodes.values():
        assert 0 < node["min_workers"] <= node["max_workers"]
        assert ("GPU" in node["resources"]) == (name != "overlays/kind-cpu")


def node_types(name: str) -> dict:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = {"metadata": {"name": "rushes", "namespace": "rushes"}, "spec": cluster_spec(name)}
    return _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]


# ---------------------------------------------------------------------------------------------- the command


def command(name: str):
    """(parameters of `rushes train`, the Config they give) of an overlay's entrypoint."""
    import typer

    from jobs.cli import app

    program, verb, *arguments = shlex.split(documents(name, "RayJob")[0]["spec"]["entrypoint"])
    assert (program, verb) == ("rushes", "train")
    params = typer.main.get_command(app).commands["train"].make_context("train", arguments).params
    path = ROOT / Path(params["config"]).relative_to("/opt/rushes")
    return params, load_config(path, params["overrides"])


@pytest.mark.parametrize("name", ["base", *JOBS])
def test_the_entrypoint_is_a_real_command(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # in the image: /opt/rushes
    params, cfg = command(name)
    assert params["resume_or_start"] and cfg.run.name  # a retry goes on with what the first try started
    folder = cfg.run.dir / cfg.run.name
    head = cluster_spec(name)["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    assert mounts["/data"] == "runs" and str(folder).startswith("/data/")
    assert head["containers"][0]["workingDir"] == "/opt/rushes"
    check_samplers(cfg)
    check_prompts(cfg)
    check_rewards(cfg)


@pytest.mark.parametrize("name", ["base", *JOBS])
def test_the_actors_fit_into_their_groups(name, monkeypatch):
    """Placed first fit on the group of their role, at its maximum size; else pods would be pending for ever."""
    monkeypatch.chdir(ROOT)
    cfg = command(name)[1]
    free = []
    for node in node_types(name).values():
        free += [dict(node["resources"]) for _ in range(node["max_workers"])]
    roles = [("rollout", cfg.rollout)] * cfg.rollout.workers.max + [("learner", cfg.learner)] * cfg.learner.ranks
    roles += [("reward", reward) for reward in cfg.rewards.values() for _ in range(reward.workers.max)]
    for role, wants in roles:
        needs = wants.resources
        mine = {f"rushes_{role}": 0.001}
        assert {k: v for k, v in needs.items() if k.startswith("rushes_")} == (
            mine if name != "overlays/one-gpu" else {}
        )
        fits = [node for node in free if all(node.get(k, 0) >= v - 1e-9 for k, v in needs.items())]
        assert fits, f"{name}: no pod has room for a {role} actor with {needs}"
        for key, amount in needs.items():
            fits[0][key] = fits[0].get(key, 0) - amount


# ---------------------------------------------------------------------------------------------- security


@pytest.mark.parametrize("name", ALL)
def test_pods_meet_the_restricted_standard(name):
    for template in templates(name):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] >= 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all("hostPath" not in volume for volume in spec.get("volumes", ()))
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            context = container["securityContext"]
            assert context == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"] for volume in spec["volumes"]}
            assert {"/tmp", "/home/rushes"} <= mounts.keys() and set(mounts.values()) <= volumes
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] or (
                container["name"] == "submitter"
            )
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "rushes"


@pytest.mark.parametrize("name", ALL)
def test_each_secret_is_in_the_pods_that_need_it_and_in_no_other(name):
    """The keys of rewards' services with the reward servers, those of trackers with the controller, on the head."""
    where: dict[str, set[str]] = {}
    for template in templates(name):
        role = template["metadata"]["labels"]["app.kubernetes.io/component"]
        for container in template["spec"]["containers"]:
            sources = [source["secretRef"]["name"] for source in container.get("envFrom", ())]
            variables = [entry for entry in container.get("env", ()) if "valueFrom" in entry]
            for entry in variables:
                assert entry["valueFrom"]["secretKeyRef"]["key"] == entry["name"]
                sources.append(f"{entry['valueFrom']['secretKeyRef']['name']}/{entry['name']}")
            for source in sources:
                where.setdefault(source, set()).add(role)
    together = name == "overlays/one-gpu"  # one pod plays all roles but the controller's
    workers = {"all-roles"} if together else {"rollout", "reward", "learner"}
    assert where == {
        "rushes-secrets/HF_TOKEN": {"head", *workers},
        "rushes-trackers": {"head"},
        "rushes-rewards": {"all-roles"} if together else {"reward"},
    }


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_open_to_everyone(name):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token", "secretName": "rushes-ray-token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP" and not spec["headGroupSpec"].get("enableIngress")
    assert not documents(name, "Secret")  # none is committed
    policy = documents(name, "NetworkPolicy")[0]["spec"]
    assert policy["podSelector"]["matchLabels"] == {"app.kubernetes.io/part-of": "rushes"}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"} and all(rule["from"] for rule in policy["ingress"])
    peers = [peer for rule in policy["ingress"] for peer in rule["from"] if "namespaceSelector" in peer]
    named = [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in peers]
    assert named == ["kuberay-system", "monitoring"]  # a label of a pod can be given in any namespace


def test_ray_knows_the_names_of_its_token_settings():
    """KubeRay sets these two for authOptions; the installed Ray must read them."""
    from ray._private.authentication import authentication_token_setup, authentication_utils

    assert authentication_token_setup.AUTH_MODE_ENV_VAR == "RAY_AUTH_MODE"
    assert "token" in (authentication_utils.is_token_auth_enabled.__doc__ or "")


# ---------------------------------------------------------------------------------------------- the image


def test_versions_agree():
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (K8S / "constraints.txt").read_text(), re.MULTILINE))
    for name in ALL:
        assert cluster_spec(name)["rayVersion"] == pins["ray"]
    assert f"torch=={pins['torch']}" in (ROOT / "constraints-cpu.txt").read_text()
    wanted = re.findall(r'^    "([a-z0-9-]+)[\[>]', (ROOT / "pyproject.toml").read_text().split("optional")[0], re.M)
    assert {name.lower() for name in wanted} <= pins.keys()


def test_the_dockerfile():
    lines = (K8S / "Dockerfile").read_text().splitlines()
    sources = [line.split()[1:] for line in lines if line.startswith("FROM ")]
    stages = {source[2] for source in sources}
    assert {"cpu", "cuda"} <= stages
    base = next(line for line in lines if line.startswith("ARG PYTHON_IMAGE=")).split("=", 1)[1]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    assert all(source[0] in (*stages, "${PYTHON_IMAGE}") for source in sources)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["1000:1000"] and not any(line.startswith("HEALTHCHECK") for line in lines)
    # what it copies is let through by .dockerignore
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {p for line in lines if line.startswith("COPY ") and "--from" not in line for p in line.split()[1:-1]}
    assert copied <= allowed


# ---------------------------------------------------------------------------------------------- monitoring


def test_the_pod_monitor_matches_the_pods():
    monitor = yaml.load((K8S / "components/monitoring/podmonitor.yaml").read_text(), Loader)["spec"]
    ports = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    for name in JOBS:
        spec = cluster_spec(name)
        head, *workers = [g["template"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
        names = [{port["name"] for port in pod["spec"]["containers"][0]["ports"]} for pod in (head, *workers)]
        assert ports <= names[0] and all("metrics" in found for found in names)
    own = {k: v for k, v in monitor["selector"]["matchLabels"].items() if not k.startswith("ray.io/")}
    assert own.items() <= head["metadata"]["labels"].items()
