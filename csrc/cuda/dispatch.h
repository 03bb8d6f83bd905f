// From what is known when running to what a kernel was compiled for.
#pragma once

#include <type_traits>

#include "../combine.h"

namespace scse::cuda {

// Calls body(std::integral_constant<Combine, k>).
template <typename Body>
void with_combine(Combine k, const Body& body) {
  switch (k) {
    case Combine::add:
      return body(std::integral_constant<Combine, Combine::add>());
    case Combine::max:
      return body(std::integral_constant<Combine, Combine::max>());
    case Combine::mul:
      return body(std::integral_constant<Combine, Combine::mul>());
    case Combine::concat:
      return body(std::integral_constant<Combine, Combine::concat>());
    case Combine::channel:
      return body(std::integral_constant<Combine, Combine::channel>());
    case Combine::spatial:
      return body(std::integral_constant<Combine, Combine::spatial>());
  }
}

// Calls body(std::bool_constant<value>).
template <typename Body>
void with_bool(bool value, const Body& body) {
  value ? body(std::true_type()) : body(std::false_type());
}

}  // namespace scse::cuda
