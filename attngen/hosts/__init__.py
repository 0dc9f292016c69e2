"""The glue to diffusers; the only place that knows its internals."""
