"""Makes pytest import `tests` in its first process, which makes the directory of compiled programs for its workers."""
