"""The two halves of a model: the decode module that all tasks share, and one prefill module a task."""
