"""The published API of Kubeflow Pipelines v2beta1, as far as its double answers it."""
