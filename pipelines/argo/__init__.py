"""The compiled pipeline as Argo Workflows' own objects, for clusters without Kubeflow; made from the IR's graph."""

from pipelines.argo.objects import argo_objects

__all__ = ["argo_objects"]
