"""Object storage: one door to local disks, memory and remote stores."""
