# make demo and make test set up .venv (once) and then run; `make help` lists all targets. docs/install.md says more.
#   make PYTHON=/path/to/python3.11    another Python 3.11 than the first one found
#   make MAX_JOBS=1                    fewer compilers at a time, where memory is short
#   make test ARGS='-k router'         more arguments for what is run

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

PYTHON ?= python3.11 python3 python
# A compiler of mmcv's files takes up to 1.3 GB.
MAX_JOBS ?= $(shell awk '/MemAvailable/ {print int($$2 / 1500000) + 1}' /proc/meminfo | cat - <(nproc) | sort -n | head -1)
ARGS ?=
# Tests that start servers, clusters and browsers, and mostly wait for them.
SERVICES := tests/test_serving tests/test_bulk tests/test_web

VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
LOG := $(VENV)/setup.log
# Written last, so an interrupted set-up is repeated. Holds the folder's name: a virtual environment cannot be moved.
READY := .venv/.ready
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

# The Detectron2 side has an environment of its own, without OpenMMLab's packages.
VENV_D2 := $(CURDIR)/.venv-detectron2
READY_D2 := .venv-detectron2/.ready
ifneq ($(shell cat $(READY_D2) 2>/dev/null),$(CURDIR))
.PHONY: $(READY_D2)
endif

.PHONY: help setup demo lint test test-services test-detectron2 benchmark clean

help:
	@cat <<-'EOF'
	make setup      virtual environment in .venv, with all that the project needs
	make demo       setup, then the main job on the built-in data set; report in work_dirs/demo/report
	make lint       setup, then ruff and codespell
	make test       setup, then lint and the tests
	make test-services
	                setup, then the tests of the server, of detection in bulk (Ray) and of the demos in a browser
	make test-detectron2
	                virtual environment in .venv-detectron2 with Detectron2 0.6, then the tests of that side
	make benchmark  setup, then the benchmark
	make clean      remove .venv and build outputs; work_dirs and pip's cache stay
	EOF

setup: $(READY)

demo: $(READY)
	@"$(PY)" tools/demo.py $(ARGS)

lint: $(READY)
	@"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/codespell" .

test: $(READY) lint
	@"$(PY)" -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(SERVICES)) $(ARGS)

test-services: $(READY)
	@"$(PY)" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(SERVICES) $(ARGS)

test-detectron2: $(READY_D2)
	@OMP_NUM_THREADS=1 "$(VENV_D2)/bin/python" -m pytest -q tests_detectron2 -c tests_detectron2/pytest.ini $(ARGS)

benchmark: $(READY)
	@"$(PY)" tools/benchmark.py $(ARGS)

clean:
	@rm -rf .venv .venv-detectron2 build dist .pytest_cache projects/*.egg-info
	find projects tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Run on every kind of device that this torch can use: fails if pip's wheel was built for another torch.
define CHECK_OPS
import torch
from mmcv.ops import nms
for device in ['cpu', 'cuda'][:1 + torch.cuda.is_available()]:
    nms(torch.tensor([[0., 0., 2., 2.]], device=device), torch.ones(1, device=device), 0.5)
endef
export CHECK_OPS

$(READY): Makefile setup.py setup.cfg $(wildcard requirements/*.txt)
	@stop() { echo "$$@" >&2; exit 1; }

	# 1. What the machine must have.
	base=; problem="Python 3.11 is needed and was not found; install it, or name it: make PYTHON=/path/to/python3.11"
	for candidate in $(PYTHON); do
	  "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || continue
	  if ! "$$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
	    problem="$$(command -v "$$candidate") lacks the venv module (Debian, Ubuntu: apt install python3.11-venv)"
	  elif ! "$$candidate" -c 'import os, sys, sysconfig
	sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'; then
	    problem="$$(command -v "$$candidate") lacks Python.h (Debian, Ubuntu: apt install python3.11-dev)"
	  else
	    base=$$candidate; break
	  fi
	done
	[ -n "$$base" ] || stop "$$problem"
	echo 'int main() {}' | "$${CXX:-c++}" -x c++ -fsyntax-only - 2>/dev/null ||
	  stop "A C++ compiler is needed and '$${CXX:-c++}' does not work (Debian, Ubuntu: apt install g++; or set CXX)"

	# 2. One set-up at a time; whoever waited may find the work done.
	if command -v flock >/dev/null; then
	  exec 9<Makefile
	  flock -n 9 || { echo "Another set-up is running here; waiting for it."; flock 9; }
	  if [ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ] &&
	     [ -z "$$(find Makefile setup.py setup.cfg requirements -newer $@ 2>/dev/null)" ]; then exit; fi
	fi
	rm -f $@
	fail() { tail -n 30 "$(LOG)" >&2; stop "Set-up failed at: $$doing. Above is the end of $(LOG)."; }
	step() { doing=$$1; SECONDS=0; echo "-- $$1"; }
	took() { echo "   done in $$((SECONDS / 60)) min $$((SECONDS % 60)) s"; }
	# The whole output goes into the log, its large downloads and the compiler's progress to the screen.
	install() {
	  "$(PY)" -m pip install --no-input -c requirements/constraints.txt "$$@" 2>&1 | tee -a "$(LOG)" |
	    while IFS= read -r line; do
	      if [[ $$line =~ Downloading\ .*[0-9]\ [MG]B ]]; then
	        echo "   $${BASH_REMATCH[0]})"
	      elif [[ $$line =~ Building\ wheel\ for\ mmcv.*started ]]; then
	        echo "   mmcv's operators are compiled from source for the torch that is installed, since no ready-made build"
	        echo "   for this torch exists. Once; 2 min 5 s on two cores of an AMD EPYC, longer on a slower or loaded machine."
	      elif [[ $$line =~ ^\ *\[([0-9]+)/([0-9]+)\] ]] &&
	           (( BASH_REMATCH[1] % 5 == 0 || BASH_REMATCH[1] == 1 || BASH_REMATCH[1] == BASH_REMATCH[2] )); then
	        echo "   compiled $${BASH_REMATCH[1]} of $${BASH_REMATCH[2]} files, $$((SECONDS / 60)) min"
	      fi
	    done
	}
	install_mmcv() {
	  # Compilers are split at spaces, so a folder that has some keeps the plain one.
	  real="$${CXX:-c++}" compiler="$(CURDIR)/tools/cxx_with_precompiled_header.sh"
	  [[ $$compiler != *' '* ]] || compiler=$$real
	  CXX="$$compiler" REAL_CXX="$$real" MAX_JOBS=$(MAX_JOBS) MMCV_WITH_OPS=1 \
	    install -v --no-deps --no-build-isolation "$$@" || fail
	  # Half a gigabyte.
	  rm -rf "$${TMPDIR:-/tmp}/precompiled-$$(id -u)-"*
	}

	# 3. The environment.
	step "virtual environment in .venv, from $$(command -v "$$base")"
	"$(PY)" -m pip --version 2>/dev/null | grep -qF "$(VENV)/" || "$$base" -m venv --clear "$(VENV)" ||
	  stop "Set-up failed at: $$doing"
	: > "$(LOG)"
	took
	step "PyTorch and the other libraries: downloads of 200 MB and more"
	install -r requirements/build.txt || fail
	install -r requirements/runtime.txt -r requirements/mm-deps.txt \
	  -r requirements/compression.txt -r requirements/deploy.txt -r requirements/openvino.txt -r requirements/video.txt \
	  -r requirements/serve.txt -r requirements/bulk.txt -r requirements/ray.txt -r requirements/web-deps.txt \
	  -r requirements/tests.txt || fail
	install --no-deps -r requirements/web.txt || fail
	took
	step "mmengine, mmcv and mmdet"
	install_mmcv -r requirements/mm.txt
	took
	step "this package"
	install --no-deps --no-build-isolation -e . || fail
	took
	step "check: everything loads, and mmcv's operators run"
	run() { "$(PY)" -c "$$1" >>"$(LOG)" 2>&1; }
	run 'import torch, cv2, mmengine' || fail
	if ! run "$$CHECK_OPS"; then
	  step "mmcv once more: pip's wheel was built for another torch"
	  install_mmcv --no-cache-dir --force-reinstall "$$("$(PY)" -m pip freeze | grep '^mmcv==')"
	  run "$$CHECK_OPS" || fail
	fi
	run 'import mmdet, importlib.util, sys; sys.exit(importlib.util.find_spec("dynamicdet") is None)' || fail
	took
	echo "$(CURDIR)" > $@

# Detectron2 is in no package index under its own name. This package is the Python of its version 0.6, file by file; what
# it lacks is the extension, in whose place is a module that says so. It is unpacked, not installed: it asks for old packages.
define IMPORT_D2
import detectron2, torchvision, importlib.util, sys
from detectron2 import model_zoo
import dynamicdet_detectron2
absent = [name for name in ('mmdet', 'mmcv', 'mmengine') if importlib.util.find_spec(name)]
sys.exit(f'{absent} should not be here' if absent else 0)
endef
export IMPORT_D2

$(READY_D2): Makefile setup.py setup.cfg requirements/runtime.txt requirements/detectron2.txt requirements/constraints-detectron2.txt
	@stop() { echo "$$@" >&2; exit 1; }
	base=
	for candidate in $(PYTHON); do
	  "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || continue
	  base=$$candidate; break
	done
	[ -n "$$base" ] || stop "Python 3.11 with its venv module is needed and was not found; name it: make PYTHON=/path/to/python3.11"
	if command -v flock >/dev/null; then
	  exec 9<requirements/detectron2.txt
	  flock -n 9 || { echo "Another set-up is running here; waiting for it."; flock 9; }
	  if [ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ] &&
	     [ -z "$$(find $^ -newer $@ 2>/dev/null)" ]; then exit; fi
	fi
	rm -f $@
	python="$(VENV_D2)/bin/python" log="$(VENV_D2)/setup.log"
	fail() { tail -n 30 "$$log" >&2; stop "Set-up failed at: $$doing. Above is the end of $$log."; }
	step() { doing=$$1; SECONDS=0; echo "-- $$1"; }
	took() { echo "   done in $$((SECONDS / 60)) min $$((SECONDS % 60)) s"; }
	install() {
	  "$$python" -m pip install --no-input -c requirements/constraints-detectron2.txt "$$@" 2>&1 | tee -a "$$log" |
	    while IFS= read -r line; do
	      if [[ $$line =~ Downloading\ .*[0-9]\ [MG]B ]]; then echo "   $${BASH_REMATCH[0]})"; fi
	    done
	}
	step "virtual environment in .venv-detectron2, from $$(command -v "$$base")"
	"$$python" -m pip --version 2>/dev/null | grep -qF "$(VENV_D2)/" || "$$base" -m venv --clear "$(VENV_D2)" ||
	  stop "Set-up failed at: $$doing"
	: > "$$log"
	took
	step "PyTorch, torchvision and the other libraries: 5.5 GB, about three minutes"
	install 'setuptools<81' wheel || fail
	install -r requirements/runtime.txt -r requirements/detectron2.txt || fail
	took
	step "Detectron2 0.6, without its extension"
	rm -rf "$(VENV_D2)/detectron2-0.6"
	mkdir "$(VENV_D2)/detectron2-0.6"
	"$$python" -m pip download --no-input --no-deps --no-build-isolation --no-binary :all: \
	  -d "$(VENV_D2)/detectron2-0.6" pb1-detectron2==0.6 >>"$$log" 2>&1 || fail
	tar xzf "$(VENV_D2)"/detectron2-0.6/*.tar.gz -C "$(VENV_D2)/detectron2-0.6" --strip-components 1 --wildcards '*/detectron2/*' || fail
	echo 'get_compiler_version = get_cuda_version = lambda: "no extension"' > "$(VENV_D2)/detectron2-0.6/detectron2/_C.py"
	packages=$$("$$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	echo "$(VENV_D2)/detectron2-0.6" > "$$packages/detectron2.pth"
	took
	step "this package"
	install --no-deps --no-build-isolation -e . || fail
	took
	step "check: everything loads"
	"$$python" -c "$$IMPORT_D2" >>"$$log" 2>&1 || fail
	took
	echo "$(CURDIR)" > $@
