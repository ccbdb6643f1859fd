"""Published suites of image tasks: `coop` (11 source sets) and `elevater` (20 targets)."""
