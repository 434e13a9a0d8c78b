"""JSON Schema of what ``geneloom launch kubernetes`` writes: no field beyond these, none missing.

From the API references of Kubernetes 1.31 (Pod, ConfigMap, Secret), of Kubeflow's training operator
1.9 (PyTorchJob v1) and of its MPI operator 0.6 (MPIJob v2beta1).
"""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string"}
_NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
_QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]|[KMGTPE]i)?$"}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_YES_OR_NO = {"type": "boolean"}
_PATH = {"type": "string", "pattern": "^/"}
_WORDS = {"type": "array", "items": _TEXT, "minItems": 1}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": sorted(required),
        "additionalProperties": False,
    }


def _list(item: dict[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least}


def _map(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": value}


_METADATA = _object({"name": _NAME}, {"namespace": _NAME})
_VARIABLE = {"type": "string", "pattern": r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"}
_FROM_SECRET = _object({"secretKeyRef": _object({"name": _NAME, "key": _VARIABLE})})
_CONTAINER = _object(
    {"name": _NAME, "image": {"type": "string", "pattern": r"^\S+$"}, "command": _WORDS},
    {
        "env": _list(
            {"oneOf": [_object({"name": _VARIABLE, "value": _TEXT}),
                       _object({"name": _VARIABLE, "valueFrom": _FROM_SECRET})]}
        ),
        "resources": _object({}, {"limits": _map(_QUANTITY), "requests": _map(_QUANTITY)}),
        "volumeMounts": _list(
            _object({"name": _NAME, "mountPath": _PATH}, {"readOnly": _YES_OR_NO})
        ),
        "lifecycle": _object({"preStop": _object({"exec": _object({"command": _WORDS})})}),
    },
)  # fmt: skip
_VOLUME = {
    "oneOf": [
        _object(
            {"name": _NAME, "emptyDir": _object({"medium": {"const": "Memory"},
                                                 "sizeLimit": _QUANTITY})}
        ),
        _object(
            {"name": _NAME, "persistentVolumeClaim": _object({"claimName": _NAME},
                                                             {"readOnly": _YES_OR_NO})}
        ),
        _object({"name": _NAME, "configMap": _object({"name": _NAME})}),
    ]
}  # fmt: skip
_POD = _object(
    {
        "spec": _object(
            {"containers": _list(_CONTAINER, 1)},
            {
                "volumes": _list(_VOLUME),
                "terminationGracePeriodSeconds": _COUNT,
                "tolerations": _list(
                    _object({"key": _TEXT, "operator": {"enum": ["Exists", "Equal"]}})
                ),
                "nodeSelector": _map(_TEXT),
            },
        )
    }
)
_RUN_POLICY = _object(
    {}, {"cleanPodPolicy": {"enum": ["None", "Running", "All"]}, "backoffLimit": _COUNT}
)


def _replica(restart: list[str], number: dict[str, Any]) -> dict[str, Any]:
    return _object({"replicas": number, "restartPolicy": {"enum": restart}, "template": _POD})


_ONE, _SOME = {"const": 1}, {"type": "integer", "minimum": 1}
_PYTORCH = ["Always", "OnFailure", "Never", "ExitCode"]
_MPI = ["OnFailure", "Never"]
SCHEMAS = {
    ("v1", "ConfigMap"): _object(
        {"apiVersion": {"const": "v1"}, "kind": {"const": "ConfigMap"}, "metadata": _METADATA,
         "data": _map(_TEXT)}
    ),
    ("v1", "Secret"): _object(
        {"apiVersion": {"const": "v1"}, "kind": {"const": "Secret"}, "metadata": _METADATA,
         "stringData": _map(_TEXT)}
    ),
    ("kubeflow.org/v1", "PyTorchJob"): _object(
        {
            "apiVersion": {"const": "kubeflow.org/v1"},
            "kind": {"const": "PyTorchJob"},
            "metadata": _METADATA,
            "spec": _object(
                {
                    "pytorchReplicaSpecs": _object(
                        {"Master": _replica(_PYTORCH, _ONE)}, {"Worker": _replica(_PYTORCH, _SOME)}
                    )
                },
                {"runPolicy": _RUN_POLICY},
            ),
        }
    ),
    ("kubeflow.org/v2beta1", "MPIJob"): _object(
        {
            "apiVersion": {"const": "kubeflow.org/v2beta1"},
            "kind": {"const": "MPIJob"},
            "metadata": _METADATA,
            "spec": _object(
                {
                    "mpiReplicaSpecs": _object(
                        {"Launcher": _replica(_MPI, _ONE), "Worker": _replica(_MPI, _SOME)}
                    )
                },
                {
                    "slotsPerWorker": _SOME,
                    "runPolicy": _RUN_POLICY,
                    "mpiImplementation": {"enum": ["OpenMPI", "Intel", "MPICH"]},
                },
            ),
        }
    ),
}  # fmt: skip
