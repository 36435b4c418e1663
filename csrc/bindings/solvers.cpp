#include "solvers.h"

#include <exception>

const char* fedlora_solvers(const fedlora::operators::Problem* problem) {
  thread_local std::string text;
  text.clear();
  try {
    for (const auto& step : fedlora::operators::solvers(*problem)) {
      text += step.solver + "\t" + std::to_string(step.from) + "\t" + std::to_string(step.to) +
              "\t" + step.source + "\n";
    }
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}
