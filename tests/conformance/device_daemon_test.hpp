// DeviceDaemonTest: a daemon of the test's own making and models in device memory, of the first
// kind that this program is about.
#pragma once

#include "conformance/memory_kinds.hpp"
#include "support/daemon_test.hpp"

namespace refit::test {

class DeviceDaemonTest : public DaemonTest {
 protected:
  ~DeviceDaemonTest() override {
    daemon_.reset();
    end_of_test();
  }
  static Model device_model() {
    return {"transformer", small_tensors(),
            make_storage(memory_kinds().front(), Model::sizes_of(small_tensors()))};
  }
};

}  // namespace refit::test
