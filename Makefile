SHELL=/bin/bash
LINT_PATHS=sb3_deepcrl/ benchmarks/ docs/ tests/ zoo_configs/

# One worker a core, and a worker that has nothing left takes over tests of another one
pytest:
	python -m pytest -n auto --dist worksteal

type:
	python -m mypy sb3_deepcrl/

# lint-imports: the rooms import downwards only, see CONTRIBUTING.md
lint:
	python -m ruff check ${LINT_PATHS}
	lint-imports --no-logo

format:
	python -m ruff check --select I --fix ${LINT_PATHS}
	python -m ruff format ${LINT_PATHS}

check-codestyle:
	python -m ruff check --select I ${LINT_PATHS}
	python -m ruff format --check ${LINT_PATHS}

commit-checks: format type lint

# Needs the extra "docs". A link that leads nowhere is a warning, and a warning is an error
doc:
	python -m sphinx -W -b html docs docs/_build/html

# Runs the code blocks of README and documentation; slow ones with `python docs/check.py --slow`
docs-check:
	python docs/check.py

.PHONY: pytest type lint format check-codestyle commit-checks doc docs-check
