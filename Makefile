SHELL=/bin/bash
LINT_PATHS=sb3_deepcrl/ benchmarks/ docs/ examples/ tests/ zoo_configs/

# One worker a core, and a worker that has nothing left takes over tests of another one
pytest:
	python -m pytest -n auto --dist worksteal

type:
	python -m mypy sb3_deepcrl/

# lint-imports: subpackages import downwards only, see CONTRIBUTING.md
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

# Needs the extra "docs". A link that leads nowhere is an error, as a warning is
doc:
	python docs/check.py --links
	python -m sphinx -W -b html docs docs/_build/html

# Runs the code blocks and examples of README and documentation; slow ones with `python docs/check.py --slow`
docs-check:
	python docs/check.py

.PHONY: pytest type lint format check-codestyle commit-checks doc docs-check
