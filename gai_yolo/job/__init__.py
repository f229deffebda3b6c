"""A training job from its start to its exit code: the only place where the parts are put together."""
