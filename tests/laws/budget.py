"""How many random cases a law is tried on."""

import math
import os

import hypothesis

_PROFILES = {"quick": 0.25, "short": 1, "long": 50}


def cases(count: int) -> hypothesis.settings:
    """Returns settings for `count` cases from a fixed seed, or many more from a new one with DIALOG_JAX_LAWS=long."""
    profile = os.environ.get("DIALOG_JAX_LAWS", "short")
    if profile not in _PROFILES:
        raise ValueError(f"DIALOG_JAX_LAWS is {profile!r}; it must be one of {', '.join(_PROFILES)}.")
    options = {} if profile == "long" else {"derandomize": True, "database": None}
    return hypothesis.settings(
        max_examples=math.ceil(count * _PROFILES[profile]),
        deadline=None,  # the first case of a shape compiles
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
        print_blob=True,
        **options,
    )
