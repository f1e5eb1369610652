"""The hot loops of the fast mixture in C++, built where they run, with the same formulas in torch beside them."""
