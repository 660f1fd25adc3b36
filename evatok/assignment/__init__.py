"""Which blocks get how many tokens: the assignment space, its reward, its search and the policies."""
