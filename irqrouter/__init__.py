"""Keeps KVM irqfds assigned while nothing changes; catches, retranslates and reassigns after an invalidation."""
