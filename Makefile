SHELL=/bin/bash
LINT_PATHS=sb3_deepcrl/ benchmarks/ tests/ zoo_configs/

# One worker a core, and a worker that has nothing left takes over tests of another one
pytest:
	python -m pytest -n auto --dist worksteal

type:
	python -m mypy sb3_deepcrl/

lint:
	python -m ruff check ${LINT_PATHS}
	# The rooms of the house: see CONTRIBUTING.md
	lint-imports

format:
	python -m ruff check --select I --fix ${LINT_PATHS}
	python -m ruff format ${LINT_PATHS}

check-codestyle:
	python -m ruff check --select I ${LINT_PATHS}
	python -m ruff format --check ${LINT_PATHS}

commit-checks: format type lint

.PHONY: pytest type lint format check-codestyle commit-checks
