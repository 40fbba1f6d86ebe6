# What is made by commands: tables, notebooks, the documentation. Each is made again as a whole.
PYTHON ?= python

# The saved tables that take minutes each, on data that are at hand: 46 minutes of processor time
# together (`time make results`). `git diff simulations` then shows what differs on this machine.
results:
	$(PYTHON) -m simulations.oracle_pruning --preset small --seeds 0,1,2,3,4
	$(PYTHON) -m simulations.growth_places --preset small --seeds 0,1,2
	$(PYTHON) -m simulations.gradual_pruning --steps 200
	$(PYTHON) -m simulations.noisy_labels --preset small --seeds 0,1,2,3,4
	$(PYTHON) -m simulations.scaling_laws --preset small --seeds 0,1,2
	$(PYTHON) -m simulations.kd_fractions --preset small --seeds 0,1,2
	$(PYTHON) -m simulations.ten_metrics --preset small --seeds 0,1,2
	$(PYTHON) -m simulations.ssl_prototypes_cifar10 --preset small --seeds 0,1,2
	$(PYTHON) -m simulations.uplink_bytes --preset small --seeds 0,1,2

notebooks:
	$(PYTHON) notebooks/execute.py

.PHONY: results notebooks
