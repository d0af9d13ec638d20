"""Runs on clusters: submitted, watched, read and explained, on Kubeflow Pipelines, Argo Workflows and Vertex AI."""
