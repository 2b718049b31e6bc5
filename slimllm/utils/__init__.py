"""What every layer above uses: files that appear whole, memory, devices and dtypes."""
