"""The server's side of a fleet: certificates, a SuperLink that is kept running, nodes, runs."""
