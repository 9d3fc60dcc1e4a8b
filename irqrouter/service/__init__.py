"""Routing for VMs that live in other processes: what ``irqrouter serve`` runs."""
