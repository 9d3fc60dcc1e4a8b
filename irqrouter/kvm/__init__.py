"""The kernel edge: KVM's uAPI, the VM, eventfds, the executor, and a simulated kernel."""
