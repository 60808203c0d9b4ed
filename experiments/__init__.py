"""Studies behind the pages in docs/: ablations, convergence, representations and solvers."""
